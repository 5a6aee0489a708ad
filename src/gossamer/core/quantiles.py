"""Quantiles of magnitudes from a stream: counts by bit pattern, which merge and need no range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import NonFiniteError, UsageError

_SHIFT = 15
"""Bits of a float32 that a bucket spans: 8 of the mantissa are left, so it is 1/256 wide."""
_BUCKETS = 1 << 16


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """How many magnitudes lie in each bucket: int64 (65536,), by the upper 16 bits of |x|."""

    counts: Tensor

    @property
    def count(self) -> int:
        """How many numbers were seen."""
        return int(self.counts.sum())

    @property
    def zeros(self) -> float:
        """The fraction of exact zeros, denormal numbers among them."""
        return float(self.counts[0]) / max(1, self.count)


@dataclass(frozen=True)
class MagnitudeQuantiles:
    """Quantiles of |x| over everything seen, each within 1/256 of its value. O(numbers) time."""

    def init(self) -> Magnitudes:
        """The state before any number."""
        return Magnitudes(torch.zeros(_BUCKETS, dtype=torch.int64))

    def update(self, state: Magnitudes, x: Tensor, name: str = "") -> Magnitudes:
        """Add numbers of any float dtype and shape; raises NonFiniteError naming `name`."""
        wide = x.detach().float().reshape(-1).abs()
        if not bool(torch.isfinite(wide).all()):
            raise NonFiniteError(f"{name or 'x'}: calibration saw NaN or infinity")
        places = wide.contiguous().view(torch.int32) >> _SHIFT
        return Magnitudes(state.counts + torch.bincount(places.cpu(), minlength=_BUCKETS))

    def merge(self, a: Magnitudes, b: Magnitudes) -> Magnitudes:
        """The state that saw both streams."""
        return Magnitudes(a.counts + b.counts)


def quantile(state: Magnitudes, p: float) -> float:
    """The magnitude below which the fraction p of the numbers lies, linear within its bucket.

    Raises UsageError where no number was seen or p is outside [0, 1].
    """
    total = state.count
    if not total or not 0 <= p <= 1:
        raise UsageError(f"no quantile {p} of {total} numbers: p is from 0 to 1")
    sums = state.counts.cumsum(0)
    wanted = p * total
    place = min(int(torch.searchsorted(sums.double(), wanted)), _BUCKETS - 1)
    inside = int(state.counts[place])
    before = int(sums[place]) - inside
    edges = torch.tensor([place << _SHIFT, (place + 1) << _SHIFT], dtype=torch.int32)
    low, high = edges.view(torch.float32).tolist()
    if place == 0:
        return 0.0
    share = (wanted - before) / inside if inside else 0.0
    return float(low + (high - low) * share)
