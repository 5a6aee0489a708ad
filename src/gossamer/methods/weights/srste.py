"""SR-STE: N:M training from scratch with dense weights behind, and the SAD metric.

Trains N:M weights with dense ones behind: straight-through gradients, and a pull to zero for what
is left out.

**Paper.** Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021.
https://arxiv.org/abs/2102.04010

**Claim.** ResNet-50 at 2:4 trained from scratch reaches 77.0% on ImageNet; the decay lowers the SAD
of the support against plain straight-through training.

**Defaults.** 2:4, decay 2e-4.

**Notes.** Masks are taken anew after each step. The decay is part of the gradient, so the optimizer
scales it. It suits SGD, as published, where it is fixed at the default. Of equal weights the lower
index stays, which the released code leaves open. Its SparseLinear also drops the bias; here layers
keep it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import NM
from gossamer.core.step import Step
from gossamer.core.support import zero_outside
from gossamer.methods.weights.topology import StaticSupport
from gossamer.ops.select import select

TWO_OF_FOUR = NM(2, 4)


@dataclass(frozen=True)
class SRSTE(StaticSupport):
    """Train N:M weights with dense ones behind them.

    The forward pass has the largest |w| of each group. Gradients go straight through to all
    weights. Those outside the support are pulled to zero.

    Parameters
    ----------
    pattern : NM
        Which weights are kept.
    decay : float
        The pull to zero. 0 is plain STE.
    """

    pattern: NM = TWO_OF_FOUR
    decay: float = 2e-4

    keeps_dense_weights: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="srste",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("nm",),
        year=2021,
        link="https://arxiv.org/abs/2102.04010",
        status="stable",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, NM) or not self.decay >= 0:
            raise UsageError("SRSTE needs an N:M pattern and a decay of at least 0")

    def start(self, step: Step) -> dict[str, Tensor]:
        """The largest weights of each group."""
        return {
            x.name: select(x.weight.abs(), self.pattern, self.pattern.density, x.name).mask
            for x in step.layers
        }

    def due(self, step: int, total: int) -> bool:
        """After every step."""
        return True

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The largest of the dense weights behind."""
        return [self.start(step)]

    def edit_gradient(self, step: Step, layer: LayerInfo, gradient: Tensor) -> Tensor:
        """gradient + decay * (1 - mask) * weight; exactly the gradient where decay is 0."""
        if self.decay == 0:
            return gradient
        outside = zero_outside(layer.weight.detach().clone(), ~step.masks[layer.name])
        return gradient + self.decay * outside


def sad(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Sparse architecture divergence: the share of mask entries by layer that differ."""
    return {name: float((one[name] ^ other[name]).double().mean()) for name in one}
