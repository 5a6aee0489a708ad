"""GMP on the digits: large and sparse against small and dense, and gradual against at once."""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import arms, mlp

import gossamer as gs

LARGE, SMALL = 256, 25
"""64-256-10 at 10% keeps 1894 weights; 64-25-10 has 1850."""


def check(short: bool = False) -> dict[str, Any]:
    """Four seeds: 10% against a small dense network, cubic against one-shot at 5%."""
    seeds, steps = (2, 20) if short else (4, 250)
    every = max(1, steps // 40)
    found = arms({"small dense": lambda _: None}, seeds, steps, lambda: mlp(SMALL, norm=True))
    found |= arms(
        {
            "large dense": lambda _: None,
            "large, GMP to 10%": lambda _: gs.weights.GMP(0.1, every=every),
            "large, GMP to 5%": lambda _: gs.weights.GMP(0.05, every=every, begin=0.25),
            "large, 5% at once": lambda _: gs.weights.GMP(0.05, every=every, begin=0.25, end=0.25),
        },
        seeds,
        steps,
        lambda: mlp(LARGE, norm=True),
    )
    return record(
        "gmp",
        "A large sparse network beats a small dense one of equal non-zero count; the cubic ramp "
        "beats pruning at once.",
        f"Digits, MLP 64-{LARGE}-10 against 64-{SMALL}-10, both with BatchNorm, {steps} steps, {seeds} seeds.",
        found,
        [
            promise(
                "large sparse above small dense", found["large, GMP to 10%"], found["small dense"]
            ),
            promise(
                "cubic above at once, 5%", found["large, GMP to 5%"], found["large, 5% at once"]
            ),
        ],
    )


if __name__ == "__main__":
    main(check)
