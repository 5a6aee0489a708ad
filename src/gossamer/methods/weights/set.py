"""SET: sparse evolutionary training, dropping by magnitude and growing at random.

Rewires a fixed budget: the weights nearest to zero go, random ones come.

**Paper.** Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science, 2018. https://arxiv.org/abs/1707.04780

**Claim.** Sparse layers that rewire while training match fully connected ones with quadratically
fewer weights.

**Defaults.** Drop 0.3 of each sign, Erdos-Renyi allocation; set `every` to an epoch.

**Notes.** What was just dropped grows back only where nothing else is free. Nothing is rewired
after the last step. New weights start at zero; the released code for sparse matrices draws them,
as it does all first weights, with a standard deviation of 0.1, which is spread=0.1. QuickSelection
trains so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import ER, LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.step import Step
from gossamer.methods.weights.topology import (
    ShapeAllocation,
    StaticSupport,
    check_every,
    check_fraction,
    highest,
    layer_counts,
    random_like,
    random_masks,
    rewire,
)


@dataclass(frozen=True)
class SET(StaticSupport):
    """Drop the weights nearest to zero in each layer, and grow as many at random.

    Parameters
    ----------
    density : float
        The fraction kept, in (0, 1].
    allocation : Allocation
        How the density becomes one per layer. `ER()` by default.
    every : int
        Steps between two updates: an epoch, as published.
    drop : float
        The fraction of the smallest positive, and of the largest negative weights, that moves.
    spread : float
        The standard deviation of new weights, which are drawn around zero. 0: they start at zero.
    """

    density: float
    allocation: ShapeAllocation = field(default_factory=ER)
    every: int = 100
    drop: float = 0.3
    spread: float = 0.0

    card: ClassVar[Card] = Card(
        name="set",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("unstructured",),
        year=2018,
        link="https://arxiv.org/abs/1707.04780",
        status="stable",
    )

    def __post_init__(self) -> None:
        check_every(self.every, "SET")
        check_fraction(self.drop, "drop")
        if not 0 <= self.spread < float("inf"):
            raise UsageError(f"SET: spread is a standard deviation from 0, not {self.spread}")

    def counts(self, layers: Sequence[LayerInfo]) -> dict[str, int]:
        """The allocation's exact counts."""
        return layer_counts(layers, self.allocation, self.density)

    def start(self, step: Step) -> dict[str, Tensor]:
        """Random masks with the allocation's exact counts."""
        return random_masks(step.layers, self.counts(step.layers), step.generator)

    def due(self, step: int, total: int) -> bool:
        """Every `every` steps, not after the last."""
        return step % self.every == 0 and step < total

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The survivors, then the survivors with as many newcomers as weights dropped."""

        def elsewhere(x: LayerInfo) -> Tensor:
            return random_like(x.weight, step.generator) + (~step.masks[x.name]).double()

        stay = partial(self.survivors, number=step.number, total=step.total)
        kept, grown = rewire(step.layers, step.masks, stay, elsewhere)
        return [kept, grown] if all(bool(m.any()) for m in kept.values()) else [grown]

    def survivors(self, values: Tensor, number: int, total: int) -> Tensor:
        """All but the smallest positive and largest negative weights; zero is positive."""
        stay = torch.zeros_like(values, dtype=torch.bool)
        for side in (values >= 0, values < 0):
            count = int(side.sum())
            stay |= highest(values.abs(), side, count - int(self.drop * count))
        return stay

    def newcomers(self, count: int, generator: torch.Generator) -> Tensor:
        """Normal with the deviation `spread`; nothing is drawn for a spread of 0."""
        if not self.spread:
            return torch.zeros(count)
        return torch.randn(count, generator=generator) * self.spread
