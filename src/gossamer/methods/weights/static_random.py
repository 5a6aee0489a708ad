"""Static random sparsity: a random support, fixed from the first step to the last.

Trains under a random mask that never changes: the baseline of every mask claim.

**Paper.** The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for
Sparse Training, 2022. https://arxiv.org/abs/2202.02643

**Claim.** A randomly pruned wide network trained sparse can exceed its dense counterpart; the gap
to dense shrinks with width, and ERK beats uniform.

**Defaults.** ERK allocation; Uniform, UniformPlus and ER are the others.

**Notes.** The paper draws each weight independently and so misses the budget in small layers; here
counts are exact. Weights keep their dense initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.core.allocation import ERK, LayerInfo
from gossamer.core.card import Card
from gossamer.core.step import Step
from gossamer.methods.weights.topology import (
    ShapeAllocation,
    StaticSupport,
    layer_counts,
    random_masks,
)


@dataclass(frozen=True)
class StaticRandom(StaticSupport):
    """Train under a random mask that never changes, with exact counts per layer.

    Parameters
    ----------
    density : float
        The fraction kept, in (0, 1].
    allocation : Allocation
        How the density becomes one per layer. `ERK()` by default.
    """

    density: float
    allocation: ShapeAllocation = field(default_factory=ERK)

    growth: ClassVar[Literal["random", "gradient"]] = "random"
    card: ClassVar[Card] = Card(
        name="staticrandom",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("unstructured",),
        year=2022,
        link="https://arxiv.org/abs/2202.02643",
        status="stable",
    )

    def counts(self, layers: Sequence[LayerInfo]) -> dict[str, int]:
        """The allocation's exact counts."""
        return layer_counts(layers, self.allocation, self.density)

    def start(self, step: Step) -> dict[str, Tensor]:
        """Random masks with the allocation's exact counts."""
        return random_masks(step.layers, self.counts(step.layers), step.generator)

    def survivors(self, values: Tensor, step: int, total: int) -> Tensor:
        """Every weight."""
        return torch.ones_like(values, dtype=torch.bool)
