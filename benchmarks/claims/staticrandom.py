"""Static random masks on the digits: does width close the gap to dense, and does ERK beat uniform?"""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import arms, mlp

import gossamer as gs


def check(short: bool = False) -> dict[str, Any]:
    """Four seeds, three widths at 10%, two allocations at 5%."""
    seeds, steps, widths = (2, 20, (8, 16, 32)) if short else (4, 100, (16, 64, 256))
    found: dict[str, list[float]] = {}
    gaps = []
    for width in widths:
        both = arms(
            {
                f"dense, width {width}": lambda _: None,
                f"10% random, width {width}": lambda _: gs.weights.StaticRandom(0.1),
            },
            seeds,
            steps,
            lambda width=width: mlp(width, width, norm=True),
        )
        found |= both
        dense, sparse = both.values()
        gaps.append([a - b for a, b in zip(dense, sparse)])
    found |= arms(
        {
            "5% ERK": lambda _: gs.weights.StaticRandom(0.05),
            "5% uniform": lambda _: gs.weights.StaticRandom(0.05, gs.Uniform()),
        },
        seeds,
        steps,
        lambda: mlp(widths[-1], widths[-1], norm=True),
    )
    return record(
        "staticrandom",
        "The gap of a random mask to dense shrinks as the network gets wider; ERK beats uniform.",
        f"Digits, MLP 64-w-w-10 with BatchNorm, {steps} steps, {seeds} seeds.",
        found,
        [
            promise(f"gap smaller at width {widths[1]} than {widths[0]}", gaps[0], gaps[1]),
            promise(f"gap smaller at width {widths[2]} than {widths[1]}", gaps[1], gaps[2]),
            promise("ERK above uniform at 5%", found["5% ERK"], found["5% uniform"]),
        ],
    )


if __name__ == "__main__":
    main(check)
