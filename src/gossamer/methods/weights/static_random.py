"""Static random sparsity: a random support, fixed from the first step to the last.

Trains under a random mask that never changes: the baseline of every mask claim.

**Paper.** The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for
Sparse Training, 2022. https://arxiv.org/abs/2202.02643

**Claim.** A randomly pruned wide network trained sparse can exceed its dense counterpart; the gap
to dense shrinks with width, and ERK beats uniform.

**Defaults.** ERK allocation. The others are Uniform, UniformPlus, ER and ERKPlus, which the paper
uses on ImageNet with a dense classifier.

**Notes.** The paper draws each weight independently and so misses the budget in small layers; here
counts are exact. `resample=GraSP(density)` or SNIP keeps that method's count in each layer and draws
the places anew, as the released code does with the ratios of GraSP. Weights keep their dense
initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import ERK, LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.step import Step
from gossamer.methods.weights.grasp import GraSP
from gossamer.methods.weights.snip import SNIP
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
    resample : SNIP or GraSP, optional
        A method of the same density, whose counts per layer replace those of `allocation`. Its
        places are forgotten.
    """

    density: float
    allocation: ShapeAllocation = field(default_factory=ERK)
    resample: SNIP | GraSP | None = None

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

    def __post_init__(self) -> None:
        if self.resample is None:
            return
        fits = isinstance(self.resample, SNIP | GraSP) and self.resample.density == self.density
        if not fits:
            raise UsageError(
                f"StaticRandom: resample is SNIP({self.density:g}) or GraSP({self.density:g}), not "
                f"{self.resample!r}"
            )

    def counts(self, layers: Sequence[LayerInfo]) -> dict[str, int]:
        """The allocation's exact counts. Raises UsageError where they would be another method's."""
        if self.resample is not None:
            raise UsageError(
                "StaticRandom: the counts of `resample` need the loss, which training without "
                "dense weights lacks; leave it out"
            )
        return layer_counts(layers, self.allocation, self.density)

    def start(self, step: Step) -> dict[str, Tensor]:
        """Random masks with the exact counts of the allocation, or of the method re-sampled."""
        if self.resample is None:
            counts = self.counts(step.layers)
        else:
            counts = {n: int(mask.sum()) for n, mask in self.resample.start(step).items()}
        return random_masks(step.layers, counts, step.generator)

    def survivors(self, values: Tensor, number: int, total: int) -> Tensor:
        """Every weight."""
        return torch.ones_like(values, dtype=torch.bool)
