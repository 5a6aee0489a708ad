"""Streamed calibration statistics that merge, so that calibration can be sharded.

Each accumulator is a value with pure functions: `init(in_features) -> state`,
`update(state, x) -> state`, `merge(a, b) -> state`, `finalize(state, name) -> LayerStats`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import UsageError


@dataclass(frozen=True, eq=False)
class LayerStats:
    """What calibration saw of one layer's inputs X (count, in).

    norm: (in,), the 2-norm of each column. hessian: (in, in), (2 / count) X^T X. None where the
    statistic was not asked for.
    """

    name: str
    count: int
    norm: Tensor | None = None
    hessian: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Moment:
    """A running sum over `count` rows: squares (in,) or products (in, in).

    rest: what rounding took from `total`, of the same shape; then the products are in the upper
    triangle alone. None where the sum is plain.
    """

    total: Tensor
    count: int
    rest: Tensor | None = None


@dataclass(frozen=True)
class ColumnNorm:
    """The 2-norm of every input column. O(rows * in) time, O(in) memory."""

    dtype: torch.dtype = torch.float64

    def init(self, in_features: int) -> Moment:
        """The state before any input."""
        return Moment(torch.zeros(in_features, dtype=self.dtype), 0)

    def update(self, state: Moment, x: Tensor) -> Moment:
        """Add x (rows, in), any float dtype."""
        _check_rows(x, state.total.shape[0])
        return Moment(state.total + x.to(self.dtype).square().sum(0), state.count + x.shape[0])

    def merge(self, a: Moment, b: Moment) -> Moment:
        """The state that saw both streams."""
        return _merge(a, b)

    def finalize(self, state: Moment, name: str) -> LayerStats:
        """Statistics of the layer `name`, float32."""
        return LayerStats(name, state.count, norm=state.total.sqrt().float())


@dataclass(frozen=True)
class Hessian:
    """The layer-wise Hessian (2 / n) X^T X. O(rows * in^2) time, O(in^2) memory.

    The running sum is kept in `dtype`: float32 by default, float64 where in is small. add: does
    what `ops.statistics.add_gram` does (this layer imports none), for float32 on the CPU; the sum
    is then compensated, takes twice the memory, and a state given to `update` is used up.
    """

    dtype: torch.dtype = torch.float32
    add: Callable[[Tensor, Tensor, Tensor], None] | None = None

    def init(self, in_features: int) -> Moment:
        """The state before any input."""
        return Moment(torch.zeros(in_features, in_features, dtype=self.dtype), 0)

    def update(self, state: Moment, x: Tensor) -> Moment:
        """Add x (rows, in), any float dtype."""
        _check_rows(x, state.total.shape[0])
        x = x.to(self.dtype)
        if self.add is not None and x.is_cpu and x.dtype == torch.float32:
            rest = torch.zeros_like(state.total) if state.rest is None else state.rest
            self.add(state.total, rest, x)
            return Moment(state.total, state.count + x.shape[0], rest)
        return Moment(torch.addmm(state.total, x.t(), x), state.count + x.shape[0])

    def merge(self, a: Moment, b: Moment) -> Moment:
        """The state that saw both streams."""
        return _merge(a, b)

    def finalize(self, state: Moment, name: str) -> LayerStats:
        """Statistics of the layer `name`, in the accumulator's dtype."""
        total = state.total
        if state.rest is not None:
            total = (total + state.rest).triu()
            total = total + total.triu(1).t()
        return LayerStats(name, state.count, hessian=total * (2.0 / max(1, state.count)))


def _check_rows(x: Tensor, in_features: int) -> None:
    if x.dim() != 2 or x.shape[1] != in_features:
        raise UsageError(f"statistics take rows of {in_features} inputs, not {tuple(x.shape)}")


def _merge(a: Moment, b: Moment) -> Moment:
    if a.total.shape != b.total.shape:
        raise UsageError(
            f"statistics of {tuple(a.total.shape)} and {tuple(b.total.shape)} cannot merge"
        )
    if a.rest is None and b.rest is None:
        return Moment(a.total + b.total, a.count + b.count)
    if (a.rest is None and a.count) or (b.rest is None and b.count):
        raise UsageError("plain and compensated statistics cannot merge")
    total = a.total + b.total
    part = total - a.total
    rest = (a.total - (total - part)) + (b.total - part)
    rests = [state.rest for state in (a, b) if state.rest is not None]
    return Moment(total, a.count + b.count, rest + sum(rests[1:], rests[0]))
