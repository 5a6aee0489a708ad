"""GraNet on the digits: above GMP and RigL at 95%, and what regrowth adds."""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import arms, mlp

import gossamer as gs


def check(short: bool = False) -> dict[str, Any]:
    """Five seeds at 3%."""
    seeds, steps = (2, 30) if short else (5, 400)
    every = max(1, steps // 40)
    found = arms(
        {
            "GraNet": lambda _: gs.weights.GraNet(0.03, every=every),
            "GraNet without regrowth": lambda _: gs.weights.GraNet(0.03, every=every, regrow=False),
            "GMP": lambda _: gs.weights.GMP(0.03, gs.ERK(), every=every),
            "RigL": lambda _: gs.weights.RigL(0.03, every=every),
        },
        seeds,
        steps,
        lambda: mlp(128, 64, norm=True),
    )
    return record(
        "granet",
        "Sparse-to-sparse training with regeneration is above dense-to-sparse training and above "
        "RigL at equal steps; regrowth is what does it.",
        f"Digits, MLP 64-128-64-10 with BatchNorm at 3%, {steps} steps, {seeds} seeds.",
        found,
        [
            promise("above GMP", found["GraNet"], found["GMP"]),
            promise("above RigL", found["GraNet"], found["RigL"]),
            promise("above no regrowth", found["GraNet"], found["GraNet without regrowth"]),
        ],
    )


if __name__ == "__main__":
    main(check)
