"""GraNet: gradual global pruning with neuroregeneration.

Prunes globally on a cubic ramp and regrows by gradient what each layer lost.

**Paper.** Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, 2021.
https://arxiv.org/abs/2106.10404

**Claim.** The first sparse-to-sparse method above dense-to-sparse ones on ResNet-50 and ImageNet,
at unchanged training time.

**Defaults.** From 50% ERK; ramp over the first half of the run; drop 0.5 to 0.005 over all of it;
every 100 steps.

**Notes.** Schedules, order, growth and the number dropped, ceil(fraction x kept), are those of the
released code. Three things differ. Of n weights it keeps int(n x density) - 1 at each pruning,
because its comparison is strict; here it is the nearest whole number to n x density. Its ramp stops
one update short of the target; here it reaches it. It may empty a layer; here each keeps its
largest weight. Where `every` does not divide the ramp, its target goes by whole updates and ours by
steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from gossamer.core.allocation import ERK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.schedule import Cosine, Cubic
from gossamer.core.step import Step
from gossamer.methods.weights.gmp import prune_globally
from gossamer.methods.weights.topology import (
    ShapeAllocation,
    StaticSupport,
    check_every,
    check_fraction,
    check_phase,
    drop_and_regrow,
    layer_counts,
    random_masks,
    without_smallest,
)


@dataclass(frozen=True)
class GraNet(StaticSupport):
    """Prune globally on a cubic ramp, and regrow in each layer what was dropped there.

    After each pruning a fraction of each layer is dropped and regrown. That fraction decays by a
    cosine over the run.

    Parameters
    ----------
    density : float
        The fraction kept at the end, in (0, 1].
    initial : float
        The density at the start. 1.0 is dense-to-sparse.
    allocation : Allocation
        How the density becomes one per layer. `ERK()` by default.
    every : int
        Steps between two prunings.
    begin, end : float
        The first and the last pruning, as fractions of the run.
    drop, drop_end : float
        The fraction that is dropped and regrown, at the start and at the end of the run.
    regrow : bool
        False leaves out regeneration, for ablation.
    """

    density: float
    initial: float = 0.5
    allocation: ShapeAllocation = field(default_factory=ERK)
    every: int = 100
    begin: float = 0.0
    end: float = 0.5
    drop: float = 0.5
    drop_end: float = 0.005
    regrow: bool = True

    card: ClassVar[Card] = Card(
        name="granet",
        topic="weights",
        role="topology",
        needs=("gradients",),
        patterns=("unstructured",),
        year=2021,
        link="https://arxiv.org/abs/2106.10404",
        status="stable",
    )

    def __post_init__(self) -> None:
        check_every(self.every, "GraNet")
        check_phase(self.begin, self.end, "GraNet")
        check_fraction(self.drop, "drop")
        check_fraction(self.drop_end, "drop_end")
        if self.initial < self.density:
            raise UsageError(f"GraNet needs initial >= density, not {self.initial:g}")

    def start(self, step: Step) -> dict[str, Tensor]:
        """Random masks at the initial density."""
        layer_counts(step.layers, self.allocation, self.density)
        counts = layer_counts(step.layers, self.allocation, self.initial)
        return random_masks(step.layers, counts, step.generator)

    def due(self, step: int, total: int) -> bool:
        """Every `every` steps of the run but the last, and at the end of the ramp."""
        return (step % self.every == 0 and step < total) or step == self.ramp(total)[1]

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The globally pruned support, then the same counts rewired."""
        first, last = self.ramp(step.total)
        passed = []
        current = dict(step.masks)
        if first <= step.number <= last:
            progress = (step.number - first) / (last - first) if last > first else 1.0
            current = prune_globally(
                step.layers, current, Cubic(self.initial, self.density)(progress)
            )
            passed.append(current)
        if self.regrow:
            fraction = Cosine(self.drop, self.drop_end)(step.number / step.total)
            stay = partial(without_smallest, fraction=fraction, rounded=math.ceil)
            passed.append(drop_and_regrow(step.layers, step.gradients(), current, stay))
        return passed or [current]

    def ramp(self, total: int) -> tuple[int, int]:
        """The steps at which the ramp has its initial and its final density."""
        first = math.floor(self.begin * total)
        return first, max(1, first, math.floor(self.end * total))
