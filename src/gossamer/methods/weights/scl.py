"""SCL: sparse connectivity learned by a variable behind each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.weights.topology import Fixed, check_fraction, every_weight


@dataclass(frozen=True)
class SCL(Fixed):
    """A weight is on while its variable v is above zero; v descends, at `rate`, the loss through a
    straight-through step function plus `penalty` for each weight that is on.

    slope: the derivative taken for the step function where v <= 0 (1 identity, less a leaky
    rectifier; 0 strands what was once switched off). normalise: divide the task's gradient of v by
    its norm over each output feature.
    """

    penalty: float = 0.02
    rate: float = 0.1
    initial: float = 0.1
    slope: float = 1.0
    normalise: bool = True

    dense: ClassVar[bool] = True
    owns: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="scl",
        kind="trainer",
        title="Automatic Sparse Connectivity Learning for Neural Networks",
        year=2022,
        link="https://arxiv.org/abs/2201.05020",
        needs=(),
        patterns=("unstructured",),
        claim="Learned connections beat hand-designed and automatic pruning in sparsity, accuracy "
        "and FLOPs, without pruning criteria or sparsities per layer.",
        status="experimental",
        summary="Learns which weights are on: a variable behind each weight descends the loss and "
        "a price per connection; how dense each layer gets comes out of that.",
        defaults="price 0.02, rate 0.1, variables start at 0.1; identity straight-through.",
        notes="There is no density to ask for: the price decides. The gradient of v is weight times "
        "gradient of the masked weight; it is normalised first, then the price is added, so that "
        "the price is not rescaled; plain descent without decay moves v. A weight that is off gets "
        "no gradient, keeps its value, and comes back with it. v = 0 counts as off. Each layer "
        "keeps at least one weight. Initial variables, rate and price are not confirmed from the "
        "paper, nor the norm: here it is the 2-norm over an output feature, so a price of p "
        "prunes what pulls less than p of that feature's gradient. Without normalising layers end "
        "5.4 times as dense as one another, with it 3.4 times, in the check above.",
    )

    def __post_init__(self) -> None:
        check_fraction(self.slope, "slope")
        if not (self.penalty >= 0 and self.rate > 0 and self.initial > 0):
            raise UsageError("SCL needs penalty >= 0, rate > 0 and initial > 0")

    def start(
        self,
        layers: Sequence[LayerInfo],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Every weight on."""
        return every_weight(layers)

    def own(self, layers: Sequence[LayerInfo], generator: torch.Generator) -> dict[str, Tensor]:
        """The variables v, one per weight, float32."""
        return {
            x.name: torch.full_like(x.weight, self.initial, dtype=torch.float32) for x in layers
        }

    def refine(self, layer: LayerInfo, gradient: Tensor, mask: Tensor) -> Tensor:
        """The gradient of the weights that are on."""
        return gradient.masked_fill(~mask, 0)

    def learn(self, layer: LayerInfo, gradient: Tensor, mask: Tensor) -> Tensor:
        """v - rate * H'(v) * (g / |g| + penalty), g = weight * gradient by output feature."""
        assert layer.own is not None
        pull = (layer.weight * gradient).float()
        if self.normalise:
            pull = pull / pull.norm(dim=1, keepdim=True).clamp_min(1e-12)
        through = torch.where(layer.own > 0, 1.0, self.slope)
        return layer.own - self.rate * through * (pull + self.penalty)

    def due(self, step: int, total: int) -> bool:
        """After every step."""
        return True

    def update(
        self,
        step: int,
        total: int,
        layers: Sequence[LayerInfo],
        gradients: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> list[dict[str, Tensor]]:
        """Where v > 0, and the largest v of each layer."""
        chosen = {}
        for x in layers:
            assert x.own is not None
            mask = x.own > 0
            mask.view(-1)[x.own.argmax()] = True
            chosen[x.name] = mask
        return [chosen]
