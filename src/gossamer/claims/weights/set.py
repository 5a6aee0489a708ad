"""SET on the digits: does a rewired sparse network match dense, and does rewiring matter?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import qualities
from gossamer.testbed.vision import Digits


def one(seed: int, short: bool) -> dict[str, float]:
    """Dense, rewired and static at 5%."""
    steps = 30 if short else 300
    methods = {
        "dense": None,
        "SET": gs.weights.SET(0.05, every=max(1, steps // 30)),
        "static, ER": gs.weights.StaticRandom(0.05, gs.ER()),
    }
    return qualities(Digits(seed, norm=True), methods, steps)


def promises(found: Figures) -> list[Promise]:
    """As good as dense, better than static."""
    return [
        promise("no more than 1% below dense", "quality", found["SET"], found["dense"], 0.01),
        promise("above the static support", "quality", found["SET"], found["static, ER"]),
    ]


CLAIM = Claim(
    gs.weights.SET,
    "Sparse layers that rewire while training match fully connected ones, and beat the same "
    "sparsity held still.",
    "Digits, MLP 64-128-64-10 with BatchNorm at 5%, rewired every 10 of 300 steps.",
    one,
    promises,
)
