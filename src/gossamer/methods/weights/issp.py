"""ISS-P: iterative soft shrinkage before a hard support.

Shrinks the smallest weights a little after every step, so that a weight can still come back. At the
end of the stage it zeroes them.

**Paper.** Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution, 2023.
https://arxiv.org/abs/2303.09650

**Claim.** Soft shrinkage at every step finds better sparse super-resolution networks than norm
regularisers and training from scratch.

**Defaults.** Alpha 0.95, the same density in each layer; the stage is half of the run here.

**Notes.** Dense in memory and compute until the stage ends. The shrinkage is applied to the
weights, not to the gradient, which momentum would rescale. alpha must fit the length of the stage.
Of a layer of n weights the released code shrinks ceil(n x sparsity), and at most int(0.995 n). Here
the counts are those of the allocation, whose total is exact, and equal weights shrink from the last
on. The paper's stage is about a third of its run. Its ranking in groups of N:M is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo, Uniform
from gossamer.core.card import Card
from gossamer.core.step import Step
from gossamer.methods.weights.topology import (
    ShapeAllocation,
    StaticSupport,
    check_fraction,
    every_weight,
    keep_largest,
    layer_counts,
)


@dataclass(frozen=True)
class ISSP(StaticSupport):
    """Shrink the smallest weights of each layer after every step, then zero them.

    They are chosen anew each time, so that a weight can still come back.

    Parameters
    ----------
    density : float
        The fraction kept at the end, in (0, 1].
    alpha : float
        What the smallest weights are multiplied by. 0 is iterative hard thresholding.
    until : float
        The end of the first stage, as a fraction of the run. The rest trains under the mask.
    allocation : Allocation
        How the density becomes one per layer. `Uniform()` by default.
    """

    density: float
    alpha: float = 0.95
    until: float = 0.5
    allocation: ShapeAllocation = field(default_factory=Uniform)

    card: ClassVar[Card] = Card(
        name="issp",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("unstructured",),
        year=2023,
        link="https://arxiv.org/abs/2303.09650",
        status="stable",
    )

    def __post_init__(self) -> None:
        check_fraction(self.alpha, "alpha")
        check_fraction(self.until, "until")

    def start(self, step: Step) -> dict[str, Tensor]:
        """Every weight; the target is checked now rather than at the end of the stage."""
        layer_counts(step.layers, self.allocation, self.density)
        return every_weight(step.layers)

    def due(self, step: int, total: int) -> bool:
        """At the last step of the stage."""
        return step == self.last(total)

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The largest weights of each layer, for good."""
        return [self.largest(step.layers)]

    def edit_weights(self, step: Step) -> dict[str, Tensor]:
        """The weights with the smallest multiplied by alpha; none once the stage is over."""
        if step.number > self.last(step.total):
            return {}
        chosen = self.largest(step.layers)
        return {
            x.name: torch.where(chosen[x.name], x.weight, self.alpha * x.weight)
            for x in step.layers
        }

    def largest(self, layers: Sequence[LayerInfo]) -> dict[str, Tensor]:
        """The exact count of largest |w| in each layer."""
        counts = layer_counts(layers, self.allocation, self.density)
        return {
            x.name: keep_largest(
                x.weight, torch.ones_like(x.weight, dtype=torch.bool), counts[x.name]
            )
            for x in layers
        }

    def last(self, total: int) -> int:
        """The last step of the selection stage."""
        return max(1, math.floor(self.until * total))
