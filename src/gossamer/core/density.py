"""What a density means, and which scores can be ranked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.core.errors import NonFiniteError, UsageError


def kept_count(n: int, density: float) -> int:
    """How many of `n` units a density keeps: the nearest whole number, halves upward."""
    return min(n, math.floor(density * n + 0.5))


def check_density(density: float) -> float:
    """Return the density as a float; raise UsageError unless 0 < density <= 1."""
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise UsageError(f"density is a number in (0, 1], not {density!r}")
    if not 0.0 < density <= 1.0:
        raise UsageError(f"density is the fraction kept, in (0, 1], not {density}")
    return float(density)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise NonFiniteError naming the tensor when it holds NaN or infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # Where memory is in order, least and largest take one pass and no copy; NaN becomes both.
    ends = torch.aminmax(tensor) if tensor.is_contiguous() else (tensor,)
    if not all(bool(torch.isfinite(end).all()) for end in ends):
        raise NonFiniteError(f"{name}: holds NaN or inf, so it cannot be ranked")
