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
