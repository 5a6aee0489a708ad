"""Wanda on SmolLM2-135M: above magnitude, without retraining, and near SparseGPT?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.language import WHERE, one
from gossamer.claims.ledger import Claim, Figures, Promise, promise

SLACK = 0.05


def promises(found: Figures) -> list[Promise]:
    """Below magnitude, and close to SparseGPT."""
    lines = []
    for pattern, suffix in (("50%", ""), ("2:4", " at 2:4")):
        wanda, magnitude, sparsegpt = (
            found[f"{name}{suffix}"] for name in ("wanda", "magnitude", "sparsegpt")
        )
        lines += [
            promise(f"{pattern}: fewer bits than Magnitude", "quality", magnitude, wanda),
            promise(
                f"{pattern}: no more than {SLACK:g} bits above SparseGPT",
                "quality",
                sparsegpt,
                wanda,
                SLACK,
            ),
        ]
    return lines


CLAIM = Claim(
    gs.weights.Wanda,
    "Without retraining, well above magnitude pruning, and competitive with SparseGPT.",
    f"50% unstructured, and 2:4. {WHERE}",
    one,
    promises,
    looks=(3,),
    remark="More patterns and densities on the bundled byte-level model are in "
    "pruning_quality.json, and the MiniLM encoder in minilm.json.",
    threads=None,
)
