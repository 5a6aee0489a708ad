"""Static random masks on the digits: does width close the gap to dense, and does ERK beat uniform?"""

from __future__ import annotations

from itertools import pairwise

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import qualities
from gossamer.testbed.vision import Digits

WIDTHS = (16, 64, 256)


def one(seed: int, short: bool) -> dict[str, float]:
    """Three widths at 10%, two allocations at 5%."""
    steps = 20 if short else 100
    found: dict[str, float] = {}
    for width in WIDTHS:
        methods = {
            f"dense, width {width}": None,
            f"10% random, width {width}": gs.weights.StaticRandom(0.1),
        }
        found |= qualities(Digits(seed, (width, width), norm=True), methods, steps)
    allocations = {
        "5% ERK": gs.weights.StaticRandom(0.05),
        "5% uniform": gs.weights.StaticRandom(0.05, gs.Uniform()),
    }
    return found | qualities(Digits(seed, (WIDTHS[-1],) * 2, norm=True), allocations, steps)


def promises(found: Figures) -> list[Promise]:
    """The gap from width to width, and the allocations."""
    gaps = {
        w: [a - b for a, b in zip(found[f"dense, width {w}"], found[f"10% random, width {w}"])]
        for w in WIDTHS
    }
    return [
        *(
            promise(f"gap smaller at width {b} than {a}", "quality", gaps[a], gaps[b])
            for a, b in pairwise(WIDTHS)
        ),
        promise("ERK above uniform at 5%", "quality", found["5% ERK"], found["5% uniform"]),
    ]


CLAIM = Claim(
    gs.weights.StaticRandom,
    "The gap of a random mask to dense shrinks as the network gets wider; ERK beats uniform.",
    "Digits, MLP 64-w-w-10 with BatchNorm, 100 steps.",
    one,
    promises,
)
