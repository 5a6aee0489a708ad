"""Sparse model soups on the digits: is the average better than its members and than longer IMP?"""

from __future__ import annotations

from typing import Any

from torch import nn

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import train
from gossamer.testbed.vision import Digits

DENSITY, PHASES = 0.05, 3


def one(seed: int, short: bool) -> dict[str, float]:
    """Accuracy of the soup, its members, and pruning in phases trained as long in total."""
    steps, copies = (20, 2) if short else (150, 3)
    problem = Digits(seed, norm=True)
    members: dict[int, list[float]] = {}

    def retrain(model: nn.Module, trainer: Any, part: gs.RoundPart) -> None:
        order = 100 * seed + part.member
        train(problem, model, trainer, steps, lr=0.05 if part.index else 0.1, order=order)
        members.setdefault(part.index, []).append(problem.quality(model))

    def longer(model: nn.Module, trainer: Any, part: gs.RoundPart) -> None:
        times = copies if part.index else 1
        train(problem, model, trainer, times * steps, lr=0.05 if part.index else 0.1)

    soup, plain = problem.build(seed), problem.build(seed)
    method = gs.weights.SparseModelSoups(DENSITY, PHASES, copies)
    data = list(problem.data[0].split(64))
    gs.train_rounds(soup, method, retrain, include=("*",), data=data)
    alone = gs.weights.SparseModelSoups(DENSITY, PHASES, 1)
    gs.train_rounds(plain, alone, longer, include=("*",))
    last = members[PHASES]
    return {
        "dense": members[0][0],
        "soup": problem.quality(soup),
        "mean of members": sum(last) / len(last),
        "best member": max(last),
        "phases trained longer": problem.quality(plain),
    }


def promises(found: Figures) -> list[Promise]:
    """Above its members, and above as much training of one model."""
    return [
        promise(
            "soup above the mean of its members", "quality", found["soup"], found["mean of members"]
        ),
        promise(
            "soup above longer training", "quality", found["soup"], found["phases trained longer"]
        ),
    ]


CLAIM = Claim(
    gs.weights.SparseModelSoups,
    "The soup beats its members, and plain pruning in phases with the same training in total.",
    "Digits, MLP 64-128-64-10 with BatchNorm, density 0.05 in 3 phases, 3 copies, 150 steps each; "
    "the baseline retrains one copy for 450 steps in each phase.",
    one,
    promises,
)
