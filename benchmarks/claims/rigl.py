"""RigL on the digits: at equal training FLOPs, does sparse-to-sparse match dense-to-sparse?"""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import accuracy, arms, mlp, seeded, train

import gossamer as gs

DENSITY = 0.05


def check(short: bool = False) -> dict[str, Any]:
    """Four seeds at 5%; RigL and the static mask train for as long as GMP's FLOPs last."""
    seeds, steps = (2, 20) if short else (4, 60)
    every = max(1, steps // 15)
    spent, gmp = [], []
    for seed in range(seeds):
        model = seeded(lambda: mlp(128, 64, norm=True), seed)
        spent.append(0.0)
        train(model, gs.weights.GMP(DENSITY, gs.ERK(), every), steps, seed,
              watch=lambda run: spent.__setitem__(-1, spent[-1] + run.density))  # fmt: skip
        gmp.append(accuracy(model, seed))
    # In a perceptron a step costs its density; a growing step has a dense weight gradient, 1/3.
    budget = sum(spent) / seeds
    updates = 4 if short else 30
    longer = round((budget - 0.75 * updates * (1 - DENSITY) / 3) / DENSITY)
    found = {"GMP": gmp}
    found |= arms(
        {
            "RigL": lambda _: gs.weights.RigL(DENSITY, every=max(1, longer // updates)),
            "SET": lambda _: gs.weights.SET(DENSITY, gs.ERK(), every=max(1, longer // updates)),
            "static": lambda _: gs.weights.StaticRandom(DENSITY),
        },
        seeds,
        longer,
        lambda: mlp(128, 64, norm=True),
    )
    return record(
        "rigl",
        "Training sparse from start to end matches or beats dense-to-sparse training at a fixed "
        "cost, and beats random growth and static masks.",
        f"Digits, MLP 64-128-64-10 with BatchNorm at 5%, ERK; GMP {steps} steps, the others {longer} at the same "
        f"multiply-adds (RigL's dense gradients counted), {seeds} seeds.",
        found,
        [
            promise("RigL no more than 0.5% below GMP", found["RigL"], found["GMP"], 0.005),
            promise("RigL above SET", found["RigL"], found["SET"]),
            promise("RigL above static", found["RigL"], found["static"]),
        ],
        remark="With BatchNorm at its usual eps of 1e-5 RigL can collapse: rigl_stability.json.",
    )


if __name__ == "__main__":
    main(check)
