"""Wanda on SmolLM2-135M: above magnitude, without retraining, and near SparseGPT?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.language import WHERE, one
from gossamer.claims.ledger import Claim, Figures, Promise, promise


def promises(found: Figures) -> list[Promise]:
    """Below magnitude, and close to SparseGPT."""
    wanda = found["wanda"]
    return [
        promise("fewer bits than magnitude", "quality", found["magnitude"], wanda),
        promise(
            "no more than 0.05 bits above SparseGPT", "quality", found["sparsegpt"], wanda, 0.05
        ),
    ]


CLAIM = Claim(
    gs.weights.Wanda,
    "Without retraining, well above magnitude pruning, and competitive with SparseGPT.",
    f"50% unstructured. {WHERE}",
    one,
    promises,
    looks=(3,),
    remark="More patterns and densities on the bundled byte-level model are in "
    "pruning_quality.json, and the MiniLM encoder in minilm.json.",
    threads=None,
)
