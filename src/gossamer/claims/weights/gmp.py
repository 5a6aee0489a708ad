"""GMP on the digits: large and sparse against small and dense, and gradual against at once."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import qualities
from gossamer.testbed.vision import Digits

LARGE, SMALL = 256, 25
"""64-256-10 at 10% keeps 1894 weights; 64-25-10 has 1850."""


def one(seed: int, short: bool) -> dict[str, float]:
    """10% against a small dense network, cubic against at once at 5%."""
    steps = 20 if short else 250
    every = max(1, steps // 40)
    small, large = Digits(seed, (SMALL,), norm=True), Digits(seed, (LARGE,), norm=True)
    return qualities(small, {"small dense": None}, steps) | qualities(
        large,
        {
            "large dense": None,
            "large, GMP to 10%": gs.weights.GMP(0.1, every=every),
            "large, GMP to 5%": gs.weights.GMP(0.05, every=every, begin=0.25),
            "large, 5% at once": gs.weights.GMP(0.05, every=every, begin=0.25, end=0.25),
        },
        steps,
    )


def promises(found: Figures) -> list[Promise]:
    """Above a small dense network, and above pruning at once."""
    return [
        promise(
            "large sparse above small dense",
            "quality",
            found["large, GMP to 10%"],
            found["small dense"],
        ),
        promise(
            "cubic above at once, 5%",
            "quality",
            found["large, GMP to 5%"],
            found["large, 5% at once"],
        ),
    ]


CLAIM = Claim(
    gs.weights.GMP,
    "A large sparse network beats a small dense one of equal non-zero count; the cubic ramp beats "
    "pruning at once.",
    f"Digits, MLP 64-{LARGE}-10 against 64-{SMALL}-10, both with BatchNorm, 250 steps.",
    one,
    promises,
)
