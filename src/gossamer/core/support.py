"""The kept positions of a weight, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.core.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Support:
    """Which weights are kept.

    Attributes
    ----------
    mask : Tensor
        bool, of the weight's shape. True where kept.
    pattern : Pattern
        Which weights are kept together.
    requested_density : float
        The density asked for.
    """

    mask: Tensor
    pattern: Pattern
    requested_density: float

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise UsageError(f"a support's mask is bool, not {self.mask.dtype}")

    @property
    def count(self) -> int:
        """How many weights are kept."""
        return int(self.mask.sum())

    @property
    def density(self) -> float:
        """The measured density; 1.0 for an empty tensor, of which nothing was removed."""
        return self.count / self.mask.numel() if self.mask.numel() else 1.0

    def apply(self, weight: Tensor) -> Tensor:
        """A copy of `weight` with removed positions exactly zero, even where they held NaN."""
        if weight.shape != self.mask.shape:
            raise UsageError(
                f"support of shape {tuple(self.mask.shape)} cannot be applied to a weight of "
                f"shape {tuple(weight.shape)}"
            )
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype))


_WORDS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""Whole numbers as wide as real ones."""


def zero_outside(tensor: Tensor, mask: Tensor) -> Tensor:
    """Set what lies outside a bool mask of the tensor's shape to +0, in place; returns the tensor.

    What `masked_fill_(~mask, 0)` does, NaN and infinity included. It multiplies the bits, which
    has no branches and so takes a fraction of the time where masks are random.
    """
    words = _WORDS.get(tensor.dtype)
    if words is None or type(tensor) is not Tensor:
        return tensor.masked_fill_(~mask, 0)
    tensor.view(words).mul_(mask.view(torch.int8))
    return tensor
