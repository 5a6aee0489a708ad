"""GraSP on the digits: close to dense at 20%, and against SNIP where little is left."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.start import accuracies, methods
from gossamer.testbed.vision import Digits

MILD, EXTREME = 0.2, 0.02


def one(seed: int, short: bool) -> dict[str, float]:
    """Dense, and every mask chosen before training, at both densities."""
    problem, steps = Digits(seed, norm=True), 30 if short else 400
    found = accuracies(problem, {"dense": None}, steps)
    for density in (MILD, EXTREME):
        made = {f"{name} at {density:.0%}": x for name, x in methods(problem, density).items()}
        made.pop("SynFlow at 20%", None)
        found |= accuracies(problem, made, steps)
    return found


def promises(found: Figures) -> list[Promise]:
    """Nearly dense at 20%; better than SNIP, magnitude and random where 2% are left."""
    grasp = found["GraSP at 2%"]
    return [
        promise(
            "20%: at most 1.6% below dense", "quality", found["GraSP at 20%"], found["dense"], 0.016
        ),
        promise("2%: above SNIP", "quality", grasp, found["SNIP at 2%"]),
        promise("2%: above magnitude at the start", "quality", grasp, found["magnitude at 2%"]),
        promise("2%: above a random mask", "quality", grasp, found["random, ERK at 2%"]),
    ]


CLAIM = Claim(
    gs.weights.GraSP,
    "One batch at initialisation finds a mask that loses at most 1.6% at 80% sparsity, and at "
    "extreme sparsity is significantly better than SNIP's.",
    "Digits, MLP 64-128-64-10 with BatchNorm at 20% and 2%, one batch of 64, 400 steps.",
    one,
    promises,
    remark="A mask that empties a layer counts as an accuracy of 0.1.",
)
