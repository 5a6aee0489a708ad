"""SNIP on the digits: does one batch at initialisation find a mask that trains nearly to dense?"""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import arms, mlp

import gossamer as gs


def check(short: bool = False) -> dict[str, Any]:
    """Five seeds at 5%."""
    seeds, steps = (2, 30) if short else (5, 400)
    found = arms(
        {
            "dense": lambda _: None,
            "SNIP": lambda _: gs.weights.SNIP(0.05),
            "random, ERK": lambda _: gs.weights.StaticRandom(0.05),
        },
        seeds,
        steps,
        lambda: mlp(128, 64, norm=True),
    )
    return record(
        "snip",
        "One batch at initialisation finds a mask that trains to nearly the dense accuracy.",
        f"Digits, MLP 64-128-64-10 with BatchNorm at 5%, one batch of 64, {steps} steps, {seeds} seeds.",
        found,
        [
            promise("no more than 2% below dense", found["SNIP"], found["dense"], 0.02),
            promise("above a random mask", found["SNIP"], found["random, ERK"]),
        ],
    )


if __name__ == "__main__":
    main(check)
