"""GraSP on the digits: close to dense at 20%, and against SNIP where little is left."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.start import accuracies, methods
from gossamer.testbed.vision import Digits

MILD, EXTREME = 0.2, (0.05, 0.02)
BASELINES = ("SNIP", "magnitude, ERK", "random, ERK")


def one(seed: int, short: bool) -> dict[str, float]:
    """Dense, and masks chosen before training at three densities."""
    problem, steps = Digits(seed, norm=True), 30 if short else 400
    made = {"dense": None, f"GraSP at {MILD:.0%}": gs.weights.GraSP(MILD)}
    for density in EXTREME:
        every = methods(problem, density)
        made |= {f"{name} at {density:.0%}": every[name] for name in ("GraSP", *BASELINES)}
    return accuracies(problem, made, steps)


def promises(found: Figures) -> list[Promise]:
    """Nearly dense at 20%; better than SNIP, magnitude and random where 5% and 2% are left."""
    mild = found[f"GraSP at {MILD:.0%}"]
    lines = [promise("20%: at most 1.6% below dense", "quality", mild, found["dense"], 0.016)]
    for density in EXTREME:
        grasp = found[f"GraSP at {density:.0%}"]
        lines += [
            promise(
                f"{density:.0%}: above {name}", "quality", grasp, found[f"{name} at {density:.0%}"]
            )
            for name in BASELINES
        ]
    return lines


CLAIM = Claim(
    gs.weights.GraSP,
    "One batch at initialisation finds a mask that loses at most 1.6% at 80% sparsity, and at "
    "extreme sparsity is significantly better than SNIP's.",
    "Digits, MLP 64-128-64-10 with BatchNorm at 20%, 5% and 2%, one batch of 64, 400 steps.",
    one,
    promises,
    remark="A mask that empties a layer counts as an accuracy of 0.1. Random masks and magnitude "
    "at the start share the counts of ERK: over all layers together magnitude empties a layer here.",
)
