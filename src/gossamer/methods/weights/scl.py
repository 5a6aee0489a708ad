"""SCL: sparse connectivity learned by a variable behind each weight.

Learns which weights are on: a variable behind each weight descends the loss and a price per
connection; how dense each layer gets comes out of that.

**Paper.** Automatic Sparse Connectivity Learning for Neural Networks, 2022.
https://arxiv.org/abs/2201.05020

**Claim.** Learned connections beat hand-designed and automatic pruning in sparsity, accuracy and
FLOPs, without pruning criteria or sparsities per layer.

**Defaults.** Price 0.02, rate 1, variables start at 0.1; identity straight-through.

**Notes.** There is no density to ask for: the price decides. The gradient of v is weight times
gradient of the masked weight. It is normalised first and the price added then, so that the price is
not rescaled. Plain descent without decay moves v, at `rate` times the learning rate of its weight.
So supports come to rest as the schedule does. A weight that is off gets no gradient, keeps its
value bit for bit whatever momentum and decay do, and comes back with it; only its optimizer state
goes on. v = 0 counts as off. Each layer keeps at least one weight. Initial variables, rate and
price are not confirmed from the paper, nor is the norm. Here it is the 2-norm over an output
feature, so a price of p prunes what pulls less than p of that feature's gradient. The record shows
how unequal the layers become with normalising and without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.step import Step
from gossamer.core.support import zero_outside
from gossamer.methods.weights.topology import StaticSupport, check_fraction, every_weight


@dataclass(frozen=True)
class SCL(StaticSupport):
    """Learn which weights are on, by a variable v behind each.

    A weight is on while v is above zero. The variable descends the loss, through a straight-through
    step function, plus a penalty for each weight that is on.

    Parameters
    ----------
    penalty : float
        The price of a connection.
    rate : float
        The learning rate of v, as a multiple of that of its weight.
    initial : float
        Where v starts.
    slope : float
        The derivative taken for the step function where v <= 0. 1 is identity, less a leaky
        rectifier. 0 strands what was once switched off.
    normalise : bool
        Divide the task's gradient of v by its norm over each output feature.
    """

    penalty: float = 0.02
    rate: float = 1.0
    initial: float = 0.1
    slope: float = 1.0
    normalise: bool = True

    keeps_dense_weights: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="scl",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("unstructured",),
        year=2022,
        link="https://arxiv.org/abs/2201.05020",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_fraction(self.slope, "slope")
        if not (self.penalty >= 0 and self.rate > 0 and self.initial > 0):
            raise UsageError("SCL needs penalty >= 0, rate > 0 and initial > 0")

    def start(self, step: Step) -> dict[str, Tensor]:
        """Every weight on."""
        return every_weight(step.layers)

    def first_state(self, step: Step) -> dict[str, dict[str, Tensor]]:
        """The variables v, one per weight, float32."""
        return {
            x.name: {"v": torch.full_like(x.weight, self.initial, dtype=torch.float32)}
            for x in step.layers
        }

    def edit_gradient(self, step: Step, layer: LayerInfo, gradient: Tensor) -> Tensor:
        """The gradient of the weights that are on."""
        return zero_outside(gradient.clone(), step.masks[layer.name])

    def frozen(self, step: Step) -> dict[str, Tensor]:
        """The weights that are off."""
        return {name: ~mask for name, mask in step.masks.items()}

    def next_state(self, step: Step, layer: LayerInfo, gradient: Tensor) -> dict[str, Tensor]:
        """v - rate * lr * H'(v) * (g / |g| + penalty), g = weight * gradient by output feature."""
        v, pull = layer.state["v"], (layer.weight * gradient).float()
        if self.normalise:
            pull = pull / pull.norm(dim=1, keepdim=True).clamp_min(1e-12)
        through = torch.where(v > 0, 1.0, self.slope)
        rate = self.rate * step.rates[layer.name]
        return {"v": v - rate * through * (pull + self.penalty)}

    def due(self, step: int, total: int) -> bool:
        """After every step."""
        return True

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """Where v > 0, and the largest v of each layer."""
        chosen = {}
        for x in step.layers:
            v = x.state["v"]
            mask = v > 0
            mask.view(-1)[v.argmax()] = True
            chosen[x.name] = mask
        return [chosen]
