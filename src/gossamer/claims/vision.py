"""One training loop on the digits for the claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.testbed.vision import Digits

Watch = Callable[[Any], None]


def train(
    problem: Digits,
    model: nn.Module,
    method: Any,
    steps: int,
    *,
    lr: float = 0.1,
    first: int = 0,
    last: int | None = None,
    decay: float = 5e-4,
    order: int | None = None,
    watch: Watch | None = None,
) -> gs.SparseRun | None:
    """SGD with momentum and a cosine rate over `steps`, all layers in the run, of which the steps
    from `first` to `last` are taken. method None is dense. watch: called after every step.

    The seed of supports and batches is that of the problem's split; order: of batches, where it
    differs.
    """
    seed = problem.split
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + math.cos(math.pi * (first + t) / steps)) / 2
    )

    def loss(step: int) -> Tensor:
        return problem.loss(model, step, seed if order is None else order)

    def loop(run: gs.SparseRun | None) -> None:
        for step in range(first, steps if last is None else last):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
            rate.step()
            if watch is not None and run is not None:
                watch(run)

    if method is None:
        loop(None)
        return None
    include = () if getattr(method, "trains_scales", False) else ("*",)
    learned = method.card.role == "learned_mask"  # needs no gradient before it begins
    with gs.sparse_training(
        model, optimizer, method, total_steps=steps, include=include, seed=seed,
        loss=None if learned else lambda: loss(steps),
    ) as run:  # fmt: skip
        loop(run)
    return run


def qualities(
    problem: Digits, methods: Mapping[str, Any], steps: int, **how: Any
) -> dict[str, float]:
    """Held-out accuracy after training by each method, from the same weights; None is dense."""
    found = {}
    for name, method in methods.items():
        model = problem.build(problem.split)
        train(problem, model, method, steps, **how)
        found[name] = problem.quality(model)
    return found
