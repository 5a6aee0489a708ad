"""Magnitude pruning on the digits: with retraining, does a ninth of the weights keep the accuracy?"""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import accuracy, mlp, seeded, train

import gossamer as gs


def one(seed: int, steps: int) -> dict[str, float]:
    """Accuracies dense, pruned, and retrained; and of a random support retrained as long."""
    model = seeded(lambda: mlp(128, 64), seed)
    train(model, None, steps, seed)
    found = {"dense": accuracy(model, seed)}
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, method in (
        ("magnitude", gs.weights.Magnitude()),
        ("random", gs.weights.Random(seed)),
    ):
        model.load_state_dict(trained)
        gs.prune(model, method, density=1 / 9, include=("*",))
        found[f"{name}, as pruned"] = accuracy(model, seed)
        train(model, gs.weights.FixedMasks(), steps, seed, lr=0.05)
        found[f"{name}, retrained"] = accuracy(model, seed)
    return found


def check(short: bool = False) -> dict[str, Any]:
    """Four seeds."""
    seeds, steps = (2, 30) if short else (4, 200)
    runs = [one(seed, steps) for seed in range(seeds)]
    arms = {name: [run[name] for run in runs] for name in runs[0]}
    kept = arms["magnitude, retrained"]
    return record(
        "magnitude",
        "With retraining, a network keeps its accuracy with a ninth of its weights.",
        f"Digits, MLP 64-128-64-10, {steps} steps before and after pruning, {seeds} seeds.",
        arms,
        [
            promise("retrained no more than 0.5% below dense", kept, arms["dense"], 0.005),
            promise("retraining helps", kept, arms["magnitude, as pruned"]),
            promise("above a random support", kept, arms["random, retrained"]),
        ],
    )


if __name__ == "__main__":
    main(check)
