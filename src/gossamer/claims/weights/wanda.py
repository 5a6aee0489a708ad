"""Wanda on SmolLM2-135M: above magnitude, without retraining, and near SparseGPT?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.language import PATTERNS, WHERE, figure, one
from gossamer.claims.ledger import Claim, Figures, Promise, promise


def promises(found: Figures) -> list[Promise]:
    """Below magnitude, and close to SparseGPT."""
    lines = []
    for pattern in PATTERNS:
        wanda, magnitude = found[figure("wanda", pattern)], found[figure("magnitude", pattern)]
        solved = found[figure("sparsegpt", pattern)]
        near = f"no more than 0.05 bits above SparseGPT, {pattern}"
        lines += [
            promise(f"fewer bits than magnitude, {pattern}", "quality", magnitude, wanda),
            promise(near, "quality", solved, wanda, 0.05),
        ]
    return lines


CLAIM = Claim(
    gs.weights.Wanda,
    "Without retraining, well above magnitude pruning, and competitive with SparseGPT.",
    f"50%, unstructured and 2:4. {WHERE}",
    one,
    promises,
    looks=(3,),
    remark="More patterns and densities on the bundled byte-level model are in "
    "pruning_quality.json, and the MiniLM encoder in minilm.json.",
    threads=None,
)
