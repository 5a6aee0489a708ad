"""GraNet: gradual global pruning with neuroregeneration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import ERK, LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.schedule import Cosine, Cubic
from gossamer.methods.weights.gmp import prune_globally, ramp
from gossamer.methods.weights.topology import (
    Fixed,
    ShapeAllocation,
    check_every,
    check_fraction,
    drop_and_regrow,
    layer_counts,
    random_masks,
)


@dataclass(frozen=True)
class GraNet(Fixed):
    """From density `initial` prune globally on a cubic ramp, and after each pruning drop and
    regrow a fraction of each layer, decayed by a cosine from `drop` to `drop_end` over the run.

    initial=1.0 is dense-to-sparse. regrow=False leaves out regeneration, for ablation.
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

    gradients_at_update: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="granet",
        kind="trainer",
        title="Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        year=2021,
        link="https://arxiv.org/abs/2106.10404",
        needs=("gradients",),
        patterns=("unstructured",),
        claim="The first sparse-to-sparse method above dense-to-sparse ones on ResNet-50 and "
        "ImageNet, at unchanged training time.",
        status="stable",
        summary="Prunes globally on a cubic ramp and regrows by gradient what each layer lost.",
        defaults="from 50% ERK; ramp over the first half of the run; drop 0.5 to 0.005 over all of "
        "it; every 100 steps.",
        notes="The released code keeps one weight fewer at each pruning and stops one step short "
        "of the target; here counts are exact, the ramp reaches the target, and each layer keeps "
        "at least one weight.",
    )

    def __post_init__(self) -> None:
        check_every(self.every, "GraNet")
        for name in ("begin", "end", "drop", "drop_end"):
            check_fraction(getattr(self, name), name)
        if self.begin > self.end or self.initial < self.density:
            raise UsageError("GraNet needs begin <= end and initial >= density")

    def start(
        self,
        layers: Sequence[LayerInfo],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Random masks at the initial density."""
        layer_counts(layers, self.allocation, self.density)
        counts = layer_counts(layers, self.allocation, self.initial)
        return random_masks(layers, counts, generator)

    def due(self, step: int, total: int) -> bool:
        """Every `every` steps of the run but the last, and at the end of the ramp."""
        last = ramp(self.begin, self.end, total)[1]
        return (step % self.every == 0 and step < total) or step == last

    def update(
        self,
        step: int,
        total: int,
        layers: Sequence[LayerInfo],
        gradients: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> list[dict[str, Tensor]]:
        """The globally pruned support, then the same counts rewired."""
        first, last = ramp(self.begin, self.end, total)
        passed = []
        current = dict(masks)
        if first <= step <= last:
            progress = (step - first) / (last - first) if last > first else 1.0
            current = prune_globally(layers, current, Cubic(self.initial, self.density)(progress))
            passed.append(current)
        if self.regrow:
            fraction = Cosine(self.drop, self.drop_end)(step / total)
            passed.append(drop_and_regrow(layers, gradients, current, fraction))
        return passed or [current]
