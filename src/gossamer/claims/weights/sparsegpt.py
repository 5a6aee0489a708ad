"""SparseGPT on SmolLM2-135M: better than scores alone at 50%, unstructured and 2:4?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.language import PATTERNS, WHERE, figure, one
from gossamer.claims.ledger import Claim, Figures, Promise, promise


def promises(found: Figures) -> list[Promise]:
    """Below the methods that do not repair the weights that stay."""
    lines = []
    for pattern in PATTERNS:
        small = found[figure("sparsegpt", pattern)]
        for other, name in (("magnitude", "magnitude"), ("wanda", "Wanda")):
            what = f"fewer bits than {name}, {pattern}"
            lines.append(promise(what, "quality", found[figure(other, pattern)], small))
    return [
        *lines,
        Promise(
            "a small loss against dense",
            "quality",
            reason="the paper claims it of its largest models, up to 176 billion parameters, and "
            "finds a larger loss the smaller the model; this one has 135 million",
        ),
    ]


CLAIM = Claim(
    gs.weights.SparseGPT,
    "50% unstructured and 2:4 in one shot with a small loss and no retraining, better than pruning "
    "without repair.",
    f"50%, unstructured and 2:4. {WHERE}",
    one,
    promises,
    looks=(3,),
    remark="Other densities, on the bundled byte-level model, are in pruning_quality.json.",
    threads=None,
)
