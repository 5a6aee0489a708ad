"""MdGf: N:M training in which a mask decays from dense to N of M.

Trains towards N:M by shrinking what lies outside the mask, step by step, until nothing of it is
left.

**Paper.** Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, 2024.
https://arxiv.org/abs/2402.04744

**Claim.** Decaying the mask or the structure gains up to 2% in vision and 5% in language over other
recipes at high N:M sparsity.

**Defaults.** 2:4, linear; dense for the first tenth, a hard mask for the last fifth. These fractions
are ours: the paper leaves them open. The coefficient then follows from the length of the run; the
paper's own is 0.0002 a step, for runs of many thousand steps.

**Notes.** The forward uses w (E + beta (1 - E)), where E marks the largest |w| of each group, taken
anew at every forward. Steps are counted from the end of the dense phase, as the paper says; the
released code counts nearly from the start. Masked gradients are what the paper explains its gain by.
The released code passes the whole gradient on, which is gradient='straight'. In evaluation mode the
mask is hard, so that no figure is taken with beta above zero. An exponential decay ends at 0.01 of
the weight by default, and is cut to zero there. Decay of the structure (SdGf) is another method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import NM
from gossamer.core.step import Step
from gossamer.core.support import Support
from gossamer.methods.weights.topology import check_phase
from gossamer.ops.select import select

TWO_OF_FOUR = NM(2, 4)
_LAST = 0.01
"""What is left of a weight at the end of an exponential decay whose coefficient is not given."""


@dataclass(frozen=True)
class MdGf:
    """Dense until the fraction `begin` of the run; then weights outside the mask shrink until
    `end`, from where the mask is hard.

    Parameters
    ----------
    pattern : NM
        What remains.
    decay : {"linear", "exponential"}
        Multiplies them by 1 - coefficient t after t steps, or by exp(-coefficient t).
    gradient : {"masked", "straight"}
        That of the forward, or the whole one for the dense weights behind.
    begin, end : float
        Fractions of the run.
    coefficient : float, optional
        Per step; by default the one that fits the phase.
    """

    pattern: NM = TWO_OF_FOUR
    decay: Literal["linear", "exponential"] = "linear"
    gradient: Literal["masked", "straight"] = "masked"
    begin: float = 0.1
    end: float = 0.8
    coefficient: float | None = None

    freezes: ClassVar[bool] = False
    rate: ClassVar[None] = None
    card: ClassVar[Card] = Card(
        name="mdgf",
        topic="weights",
        role="learned_mask",
        needs=(),
        patterns=("nm",),
        year=2024,
        link="https://arxiv.org/abs/2402.04744",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_phase(self.begin, self.end, "MdGf")
        if not isinstance(self.pattern, NM):
            raise UsageError("MdGf needs an N:M pattern, such as NM(2, 4)")
        if self.decay not in ("linear", "exponential"):
            raise UsageError(f"MdGf: decay is linear or exponential, not {self.decay!r}")
        if self.gradient not in ("masked", "straight"):
            raise UsageError(f"MdGf: gradient is masked or straight, not {self.gradient!r}")
        if self.coefficient is not None and not self.coefficient > 0:
            raise UsageError(f"MdGf needs a coefficient above 0, not {self.coefficient}")

    def beta(self, number: int, total: int) -> float:
        """What weights outside the mask are multiplied by, after `number` steps."""
        first, last = math.floor(self.begin * total), math.floor(self.end * total)
        if number >= last:
            return 0.0
        passed, steps = max(0, number - first), last - first
        if self.decay == "linear":
            return max(0.0, 1.0 - (self.coefficient or 1 / steps) * passed)
        return math.exp(-(self.coefficient or -math.log(_LAST) / steps) * passed)

    def mask(self, layer: LayerInfo, step: Step) -> nn.Module:
        """A mask without parameters, which only follows the schedule."""
        return DecayingMask(self, layer)


class DecayingMask(nn.Module):
    """weight (E + beta (1 - E)); in evaluation mode weight E."""

    beta: Tensor

    def __init__(self, method: MdGf, layer: LayerInfo) -> None:
        super().__init__()
        self.method, self.name = method, layer.name
        self.register_buffer("beta", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight (out, in)."""
        factor = self.finish(weight.detach()).mask.to(weight.dtype)
        if self.training:
            factor = factor.clamp_min(self.beta.to(weight.dtype))
        return _product(weight, factor, self.method.gradient == "straight")

    def advance(self, step: Step) -> None:
        """Shrink by the schedule."""
        self.beta.fill_(self.method.beta(step.number, step.total))

    def finish(self, weight: Tensor) -> Support:
        """The largest |weight| of each group."""
        pattern = self.method.pattern
        return select(weight.abs(), pattern, pattern.density, self.name)


def _product(weight: Tensor, factor: Tensor, straight: bool) -> Tensor:
    """weight * factor; with `straight` the weight's gradient is that of the product."""
    return _Straight.apply(weight, factor) if straight else weight * factor


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor) -> Tensor:
        return weight * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
