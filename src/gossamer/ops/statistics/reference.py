"""The statistics operations in plain torch: the reference that the kernels are tested against."""

from __future__ import annotations

from torch import Tensor


def compensated_add(total: Tensor, rest: Tensor, product: Tensor) -> None:
    """total + rest += product in place, all (rows, cols) float32; rest takes what total cannot."""
    before = total.clone()
    total += product
    part = total - before
    rest += (before - (total - part)) + (product - part)
