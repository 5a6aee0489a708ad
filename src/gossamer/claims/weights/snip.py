"""SNIP on the digits: does one batch at initialisation find a mask that trains nearly to dense?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import qualities
from gossamer.testbed.vision import Digits


def one(seed: int, short: bool) -> dict[str, float]:
    """Dense, SNIP's mask and a random one at 5%."""
    methods = {
        "dense": None,
        "SNIP": gs.weights.SNIP(0.05),
        "random, ERK": gs.weights.StaticRandom(0.05),
    }
    return qualities(Digits(seed, norm=True), methods, 30 if short else 400)


def promises(found: Figures) -> list[Promise]:
    """Nearly as good as dense, better than random."""
    return [
        promise("no more than 2% below dense", "quality", found["SNIP"], found["dense"], 0.02),
        promise("above a random mask", "quality", found["SNIP"], found["random, ERK"]),
    ]


CLAIM = Claim(
    gs.weights.SNIP,
    "One batch at initialisation finds a mask that trains to nearly the dense accuracy.",
    "Digits, MLP 64-128-64-10 with BatchNorm at 5%, one batch of 64, 400 steps.",
    one,
    promises,
)
