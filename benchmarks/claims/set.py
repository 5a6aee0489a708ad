"""SET on the digits: does a rewired sparse network match dense, and does rewiring matter?"""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import arms, mlp

import gossamer as gs


def check(short: bool = False) -> dict[str, Any]:
    """Four seeds at 5%."""
    seeds, steps = (2, 30) if short else (4, 300)
    every = max(1, steps // 30)
    found = arms(
        {
            "dense": lambda _: None,
            "SET": lambda _: gs.weights.SET(0.05, every=every),
            "static, ER": lambda _: gs.weights.StaticRandom(0.05, gs.ER()),
        },
        seeds,
        steps,
        lambda: mlp(128, 64, norm=True),
    )
    return record(
        "set",
        "Sparse layers that rewire while training match fully connected ones, and beat the same "
        "sparsity held still.",
        f"Digits, MLP 64-128-64-10 with BatchNorm at 5%, rewired every {every} of {steps} steps, {seeds} seeds.",
        found,
        [
            promise("no more than 1% below dense", found["SET"], found["dense"], 0.01),
            promise("above the static support", found["SET"], found["static, ER"]),
        ],
    )


if __name__ == "__main__":
    main(check)
