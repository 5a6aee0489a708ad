"""SparseGPT on SmolLM2-135M: better than scores alone at 50% and 2:4?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.language import WHERE, bits
from gossamer.claims.ledger import Claim, Figures, Kind, Promise, promise

PAIRS = gs.NM(2, 4)


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per byte of each at 50% and 2:4."""
    return {
        "dense": bits(None, seed, short),
        "magnitude": bits(gs.weights.Magnitude(), seed, short),
        "wanda": bits(gs.weights.Wanda(), seed, short),
        "sparsegpt": bits(gs.weights.SparseGPT(), seed, short),
        "magnitude 2:4": bits(gs.weights.Magnitude(), seed, short, PAIRS),
        "sparsegpt 2:4": bits(gs.weights.SparseGPT(), seed, short, PAIRS),
    }


def promises(found: Figures) -> list[Promise]:
    """Below the methods that do not repair the weights that stay."""
    quality: Kind = "quality"
    small = found["sparsegpt"]
    return [
        promise("50%: fewer bits than magnitude", quality, found["magnitude"], small),
        promise("50%: fewer bits than Wanda", quality, found["wanda"], small),
        promise(
            "2:4: fewer bits than magnitude",
            quality,
            found["magnitude 2:4"],
            found["sparsegpt 2:4"],
        ),
        Promise(
            "a small loss against dense",
            quality,
            reason="the paper claims it of its largest models, up to 176 billion parameters, and "
            "finds a larger loss the smaller the model; this one has 135 million",
        ),
    ]


CLAIM = Claim(
    gs.weights.SparseGPT,
    "50% unstructured and 2:4 in one shot with a small loss and no retraining, better than pruning "
    "without repair.",
    f"50% unstructured and 2:4. {WHERE}",
    one,
    promises,
    looks=(3,),
    remark="More patterns and densities on the bundled byte-level model are in "
    "pruning_quality.json.",
    threads=None,
)
