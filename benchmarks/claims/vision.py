"""The digits for the claims: small networks, one training loop, accuracy on held-out digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.testbed import digits

BATCH = 64


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """64 inputs, hidden layers of these widths (with `norm` a BatchNorm after each), 10 classes.

    The norms' eps is 1e-3, because growth by gradient goes astray with 1e-5 (cases/rigl_stability).
    """
    sizes = (64, *widths, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for one, other in pairwise(sizes):
        layers += [
            nn.Linear(one, other),
            *([nn.BatchNorm1d(other, 1e-3)] if norm else []),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers[: -2 if norm else -1])


def train(
    model: nn.Module,
    method: Any,
    steps: int,
    seed: int,
    *,
    lr: float = 0.1,
    first: int = 0,
    last: int | None = None,
    decay: float = 5e-4,
    order: int | None = None,
    watch: Callable[[gs.SparseRun], None] | None = None,
) -> gs.SparseRun | None:
    """SGD with momentum and a cosine rate over `steps`, all layers in the run, of which the steps
    from `first` to `last` are taken. method None is dense. watch: called after every step.

    seed: of data split and supports; order: of batches, where it differs.
    """
    train_x, train_y, _, _ = digits(seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (1 + math.cos(math.pi * (first + t) / steps)) / 2,
    )

    def loss_of(step: int) -> Tensor:
        picks = torch.Generator().manual_seed(7919 * (seed if order is None else order) + step)
        rows = torch.randint(0, len(train_x), (BATCH,), generator=picks)
        return nn.functional.cross_entropy(model(train_x[rows]), train_y[rows])

    def loop(run: gs.SparseRun | None) -> None:
        for step in range(first, steps if last is None else last):
            optimizer.zero_grad()
            loss_of(step).backward()
            optimizer.step()
            rate.step()
            if watch is not None and run is not None:
                watch(run)

    if method is None:
        loop(None)
        return None
    include = () if method.trains_scales else ("*",)
    with gs.sparse_training(
        model, optimizer, method, total_steps=steps, include=include, seed=seed,
        loss=lambda: loss_of(steps),
    ) as run:  # fmt: skip
        loop(run)
    return run


def arms(
    methods: Mapping[str, Callable[[int], Any]],
    seeds: int,
    steps: int,
    build: Callable[[], nn.Module],
    **how: Any,
) -> dict[str, list[float]]:
    """Held-out accuracy of each arm on each seed; a method is made from the seed, None is dense."""
    found: dict[str, list[float]] = {}
    for name, method in methods.items():
        found[name] = []
        for seed in range(seeds):
            model = seeded(build, seed)
            train(model, method(seed), steps, seed, **how)
            found[name].append(accuracy(model, seed))
    return found


def accuracy(model: nn.Module, seed: int) -> float:
    """Share of held-out digits that are right; the model's mode is restored."""
    _, _, test_x, test_y = digits(seed=seed)
    training = model.training
    model.eval()
    with torch.no_grad():
        right = (model(test_x).argmax(1) == test_y).double().mean()
    model.train(training)
    return float(right)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model with weights from the seed."""
    torch.manual_seed(seed)
    return build()
