"""IMP on the digits: do rewound tickets reach the dense accuracy, and do the same supports with
fresh weights, or random supports, fall short?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import train
from gossamer.testbed.vision import Digits

DENSITY = 0.03


def one(seed: int, short: bool) -> dict[str, float]:
    """Accuracies of the dense network, the ticket, its support drawn anew, and a random support."""
    steps, rounds, rewind = (60, 2, 5) if short else (400, 8, 20)
    found: dict[str, float] = {}
    problem = Digits(seed)

    def part_of(model: nn.Module, trainer: Any, part: gs.RoundPart) -> None:
        train(problem, model, trainer, steps, first=part.first, last=part.last)
        if part.index == 0 and part.last is None:
            found["dense"] = problem.quality(model)

    model = problem.build(seed)
    result = gs.train_rounds(
        model, gs.weights.IMP(DENSITY, rounds, rewind), part_of, include=("*",)
    )
    found["ticket"] = problem.quality(model)
    masks = {name: support.mask for name, support in result.supports.items()}
    generator = torch.Generator().manual_seed(seed)
    shuffled = {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in masks.items()
    }
    for name, kept in (
        ("same support, fresh weights", masks),
        ("random support, same layer counts", shuffled),
    ):
        other = problem.build(1000 + seed)
        train(problem, other, gs.weights.FixedMasks(kept), steps)
        found[name] = problem.quality(other)
    return found


def promises(found: Figures) -> list[Promise]:
    """As good as dense, and better than what the ticket is not."""
    ticket = found["ticket"]
    return [
        promise("ticket no more than 1% below dense", "quality", ticket, found["dense"], 0.01),
        promise(
            "ticket above fresh weights", "quality", ticket, found["same support, fresh weights"]
        ),
        promise(
            "ticket above a random support",
            "quality",
            ticket,
            found["random support, same layer counts"],
        ),
    ]


CLAIM = Claim(
    gs.weights.IMP,
    "Tickets rewound to an early step train to the dense accuracy; the same supports with fresh "
    "weights, and random supports, do not.",
    "Digits, MLP 64-128-64-10, density 0.03 in 8 rounds, 400 steps each, rewound to step 20.",
    one,
    promises,
)
