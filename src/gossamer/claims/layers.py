"""One training loop for the claims of layers, and the choice of a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

RATES = (3e-3, 1e-2)
"""Of learning, for every way that is compared."""
TUNING = 1000
"""The seed on which each way's rate is chosen; no look comes to it."""


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW without decay, gradients clipped to norm 1, a cosine rate. loss: of the step's batch.

    after: called with the step behind `backward`, before the optimizer's step.
    """
    learned = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        after(step)
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()


def best_rates(
    quality: Callable[[str, int, float], float], ways: Sequence[str], rates: Sequence[float] = RATES
) -> dict[str, float]:
    """The rate of each way with the highest quality(way, seed, rate), on a seed of its own."""
    return {way: max(rates, key=lambda rate: quality(way, TUNING, rate)) for way in ways}
