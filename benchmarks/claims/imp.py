"""IMP on the digits: do rewound tickets reach the dense accuracy, and do the same supports with
fresh weights, or random supports, fall short?"""

from __future__ import annotations

from typing import Any

import torch
from claims.ledger import main, promise, record
from claims.vision import accuracy, mlp, seeded, train
from torch import nn

import gossamer as gs


def one(seed: int, steps: int, rounds: int, rewind: int, density: float) -> dict[str, float]:
    """Accuracies of the dense network, the ticket, its support drawn anew, and a random support."""
    found: dict[str, float] = {}

    def part_of(model: nn.Module, trainer: Any, part: gs.RoundPart) -> None:
        train(model, trainer, steps, seed, first=part.first, last=part.last)
        if part.index == 0 and part.last is None:
            found["dense"] = accuracy(model, seed)

    model = seeded(lambda: mlp(128, 64), seed)
    method = gs.weights.IMP(density, rounds, rewind)
    result = gs.train_rounds(model, method, part_of, include=("*",))
    found["ticket"] = accuracy(model, seed)
    masks = {name: support.mask for name, support in result.supports.items()}
    shuffle = torch.Generator().manual_seed(seed)
    for name, trainer in (
        ("same support, fresh weights", gs.weights.FixedMasks(masks)),
        ("random support, same layer counts", gs.weights.FixedMasks({
            key: mask.flatten()[torch.randperm(mask.numel(), generator=shuffle)].view_as(mask)
            for key, mask in masks.items()
        })),
    ):  # fmt: skip
        other = seeded(lambda: mlp(128, 64), 1000 + seed)
        train(other, trainer, steps, seed)
        found[name] = accuracy(other, seed)
    return found


def check(short: bool = False) -> dict[str, Any]:
    """Five seeds at 3% of the weights."""
    seeds, steps, rounds, rewind = (2, 60, 2, 5) if short else (5, 400, 8, 20)
    runs = [one(seed, steps, rounds, rewind, 0.03) for seed in range(seeds)]
    arms = {name: [run[name] for run in runs] for name in runs[0]}
    return record(
        "imp",
        "Tickets rewound to an early step train to the dense accuracy; the same supports with fresh "
        "weights, and random supports, do not.",
        f"Digits, MLP 64-128-64-10, density 0.03 in {rounds} rounds, {steps} steps each, rewound to "
        f"step {rewind}, {seeds} seeds.",
        arms,
        [
            promise("ticket no more than 1% below dense", arms["ticket"], arms["dense"], 0.01),
            promise(
                "ticket above fresh weights", arms["ticket"], arms["same support, fresh weights"]
            ),
            promise(
                "ticket above a random support",
                arms["ticket"],
                arms["random support, same layer counts"],
            ),
        ],
    )


if __name__ == "__main__":
    main(check)
