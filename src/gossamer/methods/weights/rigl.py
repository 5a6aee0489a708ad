"""RigL: dropping by magnitude and growing by the dense gradient.

Rewires a fixed budget: the smallest weights go, those with the largest gradient come.

**Paper.** Rigging the Lottery: Making All Tickets Winners, 2020. https://arxiv.org/abs/1911.11134

**Claim.** Training sparse from start to end matches or beats dense-to-sparse training at a fixed
cost.

**Defaults.** Every 100 steps until 75% of the run, drop 0.3 decayed by a cosine; ERK.

**Notes.** New weights start at zero with fresh optimizer state. A weight that is dropped and grown
at once keeps its value. The number dropped is rounded down, as in the released code, which also
adds a little noise to |w| by default. Its decay counts from the first step of training, as ours
does. Here the optimizer's step of an update is taken before the update. The gradient that grows is
the one of that step. Dense gradients of those steps are part of the cost.

Batch norm multiplies the gradient into an emptied channel by 1 / sqrt(eps). At an eps of 1e-5 whole
layers' growth can land there, and a small network collapses on some seeds. An eps of 1e-3 or rarer
updates avoid it; benchmarks/results/rigl_stability.json holds the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from gossamer.core.allocation import ERK, LayerInfo
from gossamer.core.card import Card
from gossamer.core.schedule import Cosine
from gossamer.core.step import Step
from gossamer.methods.weights.topology import (
    ShapeAllocation,
    StaticSupport,
    check_every,
    check_fraction,
    drop_and_regrow,
    layer_counts,
    random_masks,
    without_smallest,
)


@dataclass(frozen=True)
class RigL(StaticSupport):
    """Drop the smallest |w| of each layer, and grow its largest |gradient|.

    Parameters
    ----------
    density : float
        The fraction kept, in (0, 1].
    allocation : Allocation
        How the density becomes one per layer. `ERK()` by default.
    every : int
        Steps between two updates.
    drop : float
        The fraction of each layer that moves at first. It decays by a cosine.
    until : float
        The last update, as a fraction of the run.
    """

    density: float
    allocation: ShapeAllocation = field(default_factory=ERK)
    every: int = 100
    drop: float = 0.3
    until: float = 0.75

    card: ClassVar[Card] = Card(
        name="rigl",
        topic="weights",
        role="topology",
        needs=("gradients",),
        patterns=("unstructured",),
        year=2020,
        link="https://arxiv.org/abs/1911.11134",
        status="stable",
    )

    def __post_init__(self) -> None:
        check_every(self.every, "RigL")
        check_fraction(self.drop, "drop")
        check_fraction(self.until, "until")

    def counts(self, layers: Sequence[LayerInfo]) -> dict[str, int]:
        """The allocation's exact counts."""
        return layer_counts(layers, self.allocation, self.density)

    def start(self, step: Step) -> dict[str, Tensor]:
        """Random masks with the allocation's exact counts."""
        return random_masks(step.layers, self.counts(step.layers), step.generator)

    def due(self, step: int, total: int) -> bool:
        """Every `every` steps before `until`."""
        return step % self.every == 0 and step < self.until * total

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The same count in each layer, rewired."""
        stay = partial(self.survivors, number=step.number, total=step.total)
        return [drop_and_regrow(step.layers, step.gradients(), step.masks, stay)]

    def survivors(self, values: Tensor, number: int, total: int) -> Tensor:
        """All but the fraction of the smallest |w| that is dropped at this step."""
        return without_smallest(values, Cosine(self.drop)(number / (self.until * total)))
