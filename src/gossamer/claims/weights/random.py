"""Random pruning on the digits: trained afterwards, does the gap to dense shrink with width, and does
a wide network at half its weights lose nothing?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import train
from gossamer.testbed.vision import Digits

NARROW, WIDE = 16, 256


def one(seed: int, short: bool) -> dict[str, float]:
    """Accuracies trained dense, and trained after random pruning."""
    steps, found = 20 if short else 100, {}
    for width, densities in ((NARROW, (0.1,)), (WIDE, (0.1, 0.5))):
        problem = Digits(seed, (width, width), norm=True)
        dense = problem.build(seed)
        train(problem, dense, None, steps)
        found[f"dense, width {width}"] = problem.quality(dense)
        for density in densities:
            pruned = problem.build(seed)
            gs.prune(pruned, gs.weights.Random(seed), density=density, include=("*",))
            train(problem, pruned, gs.weights.FixedMasks(), steps)
            found[f"{density:.0%}, width {width}"] = problem.quality(pruned)
    return found


def promises(found: Figures) -> list[Promise]:
    """The gap by width, and the wide network at half its weights."""
    gaps = {
        width: [a - b for a, b in zip(found[f"dense, width {width}"], found[f"10%, width {width}"])]
        for width in (NARROW, WIDE)
    }
    return [
        promise(
            f"gap at 10% smaller at width {WIDE} than {NARROW}", "quality", gaps[NARROW], gaps[WIDE]
        ),
        promise(
            f"50% at width {WIDE} no more than 0.5% below dense",
            "quality",
            found[f"50%, width {WIDE}"],
            found[f"dense, width {WIDE}"],
            0.005,
        ),
    ]


CLAIM = Claim(
    gs.weights.Random,
    "A randomly pruned wide network, trained sparse, matches its dense counterpart; the gap to "
    "dense shrinks as networks grow wider.",
    "Digits, MLP 64-w-w-10 with BatchNorm pruned before training, 100 steps.",
    one,
    promises,
)
