"""SET: sparse evolutionary training, dropping by magnitude and growing at random.

Rewires a fixed budget: the weights nearest to zero go, random ones come.

**Paper.** Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science, 2018. https://arxiv.org/abs/1707.04780

**Claim.** Sparse layers that rewire while training match fully connected ones with quadratically
fewer weights.

**Defaults.** Drop 0.3 of each sign, Erdos-Renyi allocation; set `every` to an epoch.

**Notes.** What was just dropped grows back only where nothing else is free. Nothing is rewired
after the last step. New weights start at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.core.allocation import ER, LayerInfo
from gossamer.core.card import Card
from gossamer.core.step import Step
from gossamer.methods.weights.topology import (
    ShapeAllocation,
    StaticSupport,
    check_every,
    check_fraction,
    layer_counts,
    random_like,
    random_masks,
    top_among,
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
    """

    density: float
    allocation: ShapeAllocation = field(default_factory=ER)
    every: int = 100
    drop: float = 0.3

    growth: ClassVar[Literal["random", "gradient"]] = "random"
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
        kept, grown = {}, {}
        for x in step.layers:
            mask = step.masks[x.name]
            stay = self._stay(x.weight, mask)
            score = random_like(x.weight, step.generator) + (~mask).double()
            room = int(mask.sum()) - int(stay.sum())
            kept[x.name] = stay
            grown[x.name] = stay | top_among(score, ~stay, room)
        return [kept, grown] if all(bool(m.any()) for m in kept.values()) else [grown]

    def _stay(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The mask without the smallest positive and largest negative weights; zero is positive."""
        stay = torch.zeros_like(mask)
        for side in (mask & (weight >= 0), mask & (weight < 0)):
            count = int(side.sum())
            stay |= top_among(weight.abs(), side, count - int(self.drop * count))
        return stay

    def survivors(self, values: Tensor, step: int, total: int) -> Tensor:
        """All but the smallest positive and largest negative weights."""
        return self._stay(values, torch.ones_like(values, dtype=torch.bool))
