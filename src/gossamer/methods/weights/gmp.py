"""GMP: gradual magnitude pruning on a cubic schedule.

Starts dense and removes the smallest weights on a cubic schedule; what is gone stays gone.

**Paper.** To prune, or not to prune: exploring the efficacy of pruning for model compression, 2017.
https://arxiv.org/abs/1710.01878

**Claim.** Large sparse networks beat small dense ones of equal non-zero count.

**Defaults.** Every 100 steps from the start to 75% of the run; the same density in each layer.

**Notes.** The ramp ends at the final density even where `every` does not divide it. Ending the ramp
at the last step, or during warm-up, costs accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from gossamer.core.allocation import LayerInfo, Uniform
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.schedule import Cubic
from gossamer.core.step import Step
from gossamer.methods.weights.topology import (
    ShapeAllocation,
    StaticSupport,
    check_every,
    check_phase,
    every_weight,
    highest,
    layer_counts,
)
from gossamer.ops.select import select_global


@dataclass(frozen=True)
class GMP(StaticSupport):
    """Prune by magnitude, a little at a time, along a cubic schedule.

    Parameters
    ----------
    density : float
        The fraction kept at the end, in (0, 1].
    allocation : Allocation
        How the density becomes one per layer. `Uniform()` by default.
    every : int
        Steps between two prunings.
    begin, end : float
        The first and the last pruning, as fractions of the run.
    scope : {"tensor", "global"}
        `tensor` ranks each layer against its own target from the allocation. `global` ranks all
        layers together, and each keeps at least one weight.
    """

    density: float
    allocation: ShapeAllocation = field(default_factory=Uniform)
    every: int = 100
    begin: float = 0.0
    end: float = 0.75
    scope: Literal["tensor", "global"] = "tensor"

    card: ClassVar[Card] = Card(
        name="gmp",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("unstructured",),
        year=2017,
        link="https://arxiv.org/abs/1710.01878",
        status="stable",
    )

    def __post_init__(self) -> None:
        check_every(self.every, "GMP")
        check_phase(self.begin, self.end, "GMP")
        if self.scope not in ("tensor", "global"):
            raise UsageError(f"GMP needs a scope of tensor or global, not {self.scope!r}")

    def start(self, step: Step) -> dict[str, Tensor]:
        """Every weight; the target is checked now rather than at the first update."""
        layer_counts(step.layers, self.allocation, self.density)
        return every_weight(step.layers)

    def due(self, step: int, total: int) -> bool:
        """At `begin`, every `every` steps after it, and at `end`."""
        first, last = ramp(self.begin, self.end, total)
        return first <= step <= last and ((step - first) % self.every == 0 or step == last)

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The largest weights of those still kept."""
        first, last = ramp(self.begin, self.end, step.total)
        progress = (step.number - first) / (last - first) if last > first else 1.0
        if self.scope == "global":
            density = Cubic(1.0, self.density)(progress)
            return [prune_globally(step.layers, step.masks, density)]
        targets = layer_counts(step.layers, self.allocation, self.density)
        pruned = {}
        for x in step.layers:
            count = round(Cubic(x.size, targets[x.name])(progress))
            pruned[x.name] = highest(x.weight.abs(), step.masks[x.name], count, x.name)
        return [pruned]


def ramp(begin: float, end: float, total: int) -> tuple[int, int]:
    """First and last step of a ramp given as fractions of the run; steps count from 1."""
    first = max(1, math.floor(begin * total))
    return first, max(first, math.floor(end * total))


def prune_globally(
    layers: Sequence[LayerInfo], masks: Mapping[str, Tensor], density: float
) -> dict[str, Tensor]:
    """Keep the largest |w| of the kept weights over all layers, down to `density` of all weights.

    The largest weight of each layer is always kept, so that no layer is cut off.
    """
    # What is gone ranks below every |w|; it could return only where fewer are kept than asked for.
    scores = {x.name: x.weight.abs().masked_fill(~masks[x.name], -1) for x in layers}
    supports = select_global(scores, Unstructured("global"), density, floor=1)
    return {name: support.mask & masks[name] for name, support in supports.items()}
