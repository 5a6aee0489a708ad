"""One training loop on text for the claims, and the low-rank layers that some compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import gossamer as gs
from gossamer.testbed.language import Text

RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
"""Of learning, for every way to train that is compared."""
STEPS = 300
TUNING = 1000
"""The seed on which each way's rate is chosen."""


def train(
    problem: Text,
    model: nn.Module,
    method: Any,
    steps: int,
    *,
    lr: float,
    seed: int,
    first: int = 0,
    last: int | None = None,
    exclude: Sequence[str] = (),
) -> None:
    """AdamW with gradients clipped to norm 1, a warm-up over a tenth of `steps` and a cosine rate
    after it, of which those from `first` to `last` are taken. method None is dense.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)

    def loop(run: gs.SparseRun | None) -> None:
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda t: (
                min(1.0, (first + t + 1) / warm) * (1 + math.cos(math.pi * (first + t) / steps)) / 2
            ),
        )
        for step in range(first, steps if last is None else last):
            optimizer.zero_grad()
            problem.loss(model, step, seed).backward()
            if run is not None:
                run.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()

    if method is None:
        loop(None)
        return
    with gs.sparse_training(
        model, optimizer, method, total_steps=steps, exclude=exclude, seed=seed
    ) as run:
        loop(run)


def tuned(
    fit: Callable[[str, int, int, float], float], names: Sequence[str], steps: int
) -> dict[str, float]:
    """The learning rate of each way with the fewest bits: fit(name, seed, steps, rate), on a seed
    that no look comes to."""
    return {name: min(RATES, key=lambda rate: fit(name, TUNING, steps, rate)) for name in names}


def multiply_adds(model: nn.Module) -> int:
    """Of one token in linear layers: one for each weight, for none is used twice."""
    return sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n)


@dataclass(frozen=True)
class LowRank:
    """The baseline of a product of two thin matrices, with at least `density` times the weights.

    It begins with the nearest product to the given weight.
    """

    card: ClassVar[gs.Card] = gs.weights.SLTrain.card

    def replace(
        self, layer: nn.Linear, stats: Any, density: float, generator: torch.Generator
    ) -> nn.Module:
        """Two Linear layers; the root of each singular value goes to either side."""
        out, inputs = layer.weight.shape
        rank = math.ceil(density * out * inputs / (out + inputs) - 1e-9)
        left, sizes, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        root = sizes[:rank].sqrt()
        down, up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, out, bias=False)
        with torch.no_grad():
            down.weight.copy_(right[:rank] * root[:, None])
            up.weight.copy_(left[:, :rank] * root)
        return nn.Sequential(down, up)
