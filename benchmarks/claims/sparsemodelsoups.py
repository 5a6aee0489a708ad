"""Sparse model soups on the digits: is the average better than its members and than longer IMP?"""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import accuracy, mlp, seeded, train
from torch import nn

import gossamer as gs
from gossamer.testbed import digits


def network() -> nn.Sequential:
    """Two hidden layers with BatchNorm."""
    return mlp(128, 64, norm=True)


def one(seed: int, steps: int, copies: int, density: float) -> dict[str, float]:
    """Held-out accuracy of the soup, its members, and pruning in phases trained `copies` times as
    long after each."""
    members: dict[int, list[float]] = {}

    def retrain(model: nn.Module, trainer: Any, part: gs.RoundPart) -> None:
        order = 100 * seed + part.member
        train(model, trainer, steps, seed, lr=0.05 if part.index else 0.1, order=order)
        members.setdefault(part.index, []).append(accuracy(model, seed))

    def longer(model: nn.Module, trainer: Any, part: gs.RoundPart) -> None:
        times = copies if part.index else 1
        train(model, trainer, times * steps, seed, lr=0.05 if part.index else 0.1)

    data = list(digits(seed=seed)[0].split(64))
    soup = seeded(network, seed)
    gs.train_rounds(
        soup, gs.weights.SparseModelSoups(density, 3, copies), retrain, include=("*",), data=data
    )
    plain = seeded(network, seed)
    gs.train_rounds(plain, gs.weights.SparseModelSoups(density, 3, 1), longer, include=("*",))
    last = members[3]
    return {
        "dense": members[0][0],
        "soup": accuracy(soup, seed),
        "mean of members": sum(last) / len(last),
        "best member": max(last),
        "phases trained longer": accuracy(plain, seed),
    }


def check(short: bool = False) -> dict[str, Any]:
    """Four seeds, three phases to 5% of the weights, three copies."""
    seeds, steps, copies = (2, 20, 2) if short else (4, 50, 3)
    runs = [one(seed, steps, copies, 0.05) for seed in range(seeds)]
    arms = {name: [run[name] for run in runs] for name in runs[0]}
    return record(
        "sparsemodelsoups",
        "The soup beats its members, and plain pruning in phases with the same training in total.",
        f"Digits, MLP 64-128-64-10 with BatchNorm, density 0.05 in 3 phases, {copies} copies, {steps} "
        f"steps each, {seeds} seeds.",
        arms,
        [
            promise("soup above the mean of its members", arms["soup"], arms["mean of members"]),
            promise("soup above longer training", arms["soup"], arms["phases trained longer"]),
        ],
    )


if __name__ == "__main__":
    main(check)
