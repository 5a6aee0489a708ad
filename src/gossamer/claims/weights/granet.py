"""GraNet on the digits: above GMP and RigL at 3%, and what regrowth adds."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import qualities
from gossamer.testbed.vision import Digits

DENSITY = 0.03
GMPS = ("GMP, ERK", "GMP, global")


def one(seed: int, short: bool) -> dict[str, float]:
    """GraNet, itself without regrowth, and the methods that it is compared with."""
    steps = 30 if short else 400
    every = max(1, steps // 40)
    methods = {
        "GraNet": gs.weights.GraNet(DENSITY, every=every),
        "GraNet without regrowth": gs.weights.GraNet(DENSITY, every=every, regrow=False),
        "GMP, ERK": gs.weights.GMP(DENSITY, gs.ERK(), every=every),
        "GMP, global": gs.weights.GMP(DENSITY, every=every, scope="global"),
        "RigL": gs.weights.RigL(DENSITY, every=every),
    }
    return qualities(Digits(seed, norm=True), methods, steps)


def promises(found: Figures) -> list[Promise]:
    """Above the better GMP, above RigL, and above itself without regrowth."""
    gmp = max(GMPS, key=lambda name: sum(found[name]))
    return [
        promise(f"above {gmp}", "quality", found["GraNet"], found[gmp]),
        promise("above RigL", "quality", found["GraNet"], found["RigL"]),
        promise("above no regrowth", "quality", found["GraNet"], found["GraNet without regrowth"]),
    ]


CLAIM = Claim(
    gs.weights.GraNet,
    "Sparse-to-sparse training with regeneration is above dense-to-sparse training and above RigL "
    "at equal steps; regrowth is what does it.",
    "Digits, MLP 64-128-64-10 with BatchNorm at 3%, 400 steps.",
    one,
    promises,
    remark="Of two GMPs, by layer and global as in GraNet, the better on the same held-out digits "
    "is taken, in its favour.",
)
