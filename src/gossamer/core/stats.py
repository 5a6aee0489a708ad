"""Streamed calibration statistics that merge, so that calibration can be sharded.

Each accumulator is a value with pure functions: `init(in_features) -> state`,
`update(state, x) -> state`, `merge(a, b) -> state`, `finalize(state, name) -> LayerStats`.
`AngularDistance` alone sees two streams: what comes before a block, and what comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gossamer.core.errors import UsageError


@dataclass(frozen=True, eq=False)
class LayerStats:
    """What calibration saw of one layer's inputs X (count, in).

    norm: (in,), the 2-norm of each column. hessian: (in, in), (2 / count) X^T X. sum: (in,), the
    signed sum of each column. variance: (in,), the population variance of each column. within:
    (in,), the same about the mean of each update, which leaves the spread between them out.
    sequences: how many inputs the model was given, which is the sum of the batch sizes. None, or
    0, where the statistic was not asked for.
    """

    name: str
    count: int
    norm: Tensor | None = None
    hessian: Tensor | None = None
    sum: Tensor | None = None
    variance: Tensor | None = None
    within: Tensor | None = None
    sequences: int = 0


def together(parts: Iterable[LayerStats]) -> LayerStats:
    """Statistics of one layer that several accumulators gathered from the same inputs."""
    first, *others = parts
    found = {each.name: getattr(first, each.name) for each in fields(LayerStats)}
    for part in others:
        if (part.name, part.count) != (first.name, first.count):
            raise UsageError(f"statistics of {first.name} and {part.name} saw different inputs")
        for name, value in found.items():
            found[name] = getattr(part, name) if value is None else value
    return LayerStats(**found)


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

    def init(self, in_features: int, device: torch.device | None = None) -> Moment:
        """The state before any input."""
        return Moment(torch.zeros(in_features, dtype=self.dtype, device=device), 0)

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
class ColumnSum:
    """The signed sum of every input column. O(rows * in) time, O(in) memory."""

    dtype: torch.dtype = torch.float64

    def init(self, in_features: int, device: torch.device | None = None) -> Moment:
        """The state before any input."""
        return Moment(torch.zeros(in_features, dtype=self.dtype, device=device), 0)

    def update(self, state: Moment, x: Tensor) -> Moment:
        """Add x (rows, in), any float dtype."""
        _check_rows(x, state.total.shape[0])
        return Moment(state.total + x.to(self.dtype).sum(0), state.count + x.shape[0])

    def merge(self, a: Moment, b: Moment) -> Moment:
        """The state that saw both streams."""
        return _merge(a, b)

    def finalize(self, state: Moment, name: str) -> LayerStats:
        """Statistics of the layer `name`, float32."""
        return LayerStats(name, state.count, sum=state.total.float())


@dataclass(frozen=True, eq=False)
class Spread:
    """Mean of `count` rows, and sums of squared distances (in,): `total` from that mean, `inside`
    from the mean of the update that a row came with."""

    mean: Tensor
    total: Tensor
    inside: Tensor
    count: int


@dataclass(frozen=True)
class ColumnVariance:
    """The population variance of every input column. O(rows * in) time, O(in) memory.

    Squared distances are taken from means, never as a difference of large sums, so that columns
    with a mean far above their spread keep their digits.

    References
    ----------
    Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
    """

    dtype: torch.dtype = torch.float64

    def init(self, in_features: int, device: torch.device | None = None) -> Spread:
        """The state before any input."""
        zeros = torch.zeros(in_features, dtype=self.dtype, device=device)
        return Spread(zeros, zeros, zeros, 0)

    def update(self, state: Spread, x: Tensor) -> Spread:
        """Add x (rows, in), any float dtype."""
        _check_rows(x, state.mean.shape[0])
        if not len(x):
            return state
        x = x.to(self.dtype)
        mean = x.mean(0)
        total = (x - mean).square().sum(0)
        return self.merge(state, Spread(mean, total, total, len(x)))

    def merge(self, a: Spread, b: Spread) -> Spread:
        """The state that saw both streams."""
        if a.mean.shape != b.mean.shape:
            raise UsageError(
                f"statistics of {tuple(a.mean.shape)} and {tuple(b.mean.shape)} cannot merge"
            )
        count = a.count + b.count
        share = b.count / max(1, count)
        apart = b.mean - a.mean
        total = a.total + b.total + apart.square() * (a.count * share)
        return Spread(a.mean + apart * share, total, a.inside + b.inside, count)

    def finalize(self, state: Spread, name: str) -> LayerStats:
        """Statistics of the layer `name`, float32."""
        count = max(1, state.count)
        variance, within = state.total / count, state.inside / count
        return LayerStats(name, state.count, variance=variance.float(), within=within.float())


@dataclass(frozen=True)
class Hessian:
    """The layer-wise Hessian (2 / n) X^T X. O(rows * in^2) time, O(in^2) memory.

    The running sum is kept in `dtype`: float32 by default, float64 where in is small. add: does
    what `ops.statistics.add_gram` does (this layer imports none), for float32 on the CPU; the sum
    is then compensated, takes twice the memory, and a state given to `update` is used up.
    """

    dtype: torch.dtype = torch.float32
    add: Callable[[Tensor, Tensor, Tensor], None] | None = None

    def init(self, in_features: int, device: torch.device | None = None) -> Moment:
        """The state before any input."""
        shape = (in_features, in_features)
        return Moment(torch.zeros(shape, dtype=self.dtype, device=device), 0)

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


@dataclass(frozen=True)
class BlockStats:
    """What calibration saw of the hidden state on both sides of one block.

    angle: the mean over `count` tokens of the angle between what goes in and what comes out, as a
    fraction of a half turn: 0 where a block only scales, 1 where it reverses.
    """

    name: str
    count: int
    angle: float


@dataclass(frozen=True)
class AngularDistance:
    """The mean angle between two streams of rows. O(rows * width) time, no memory.

    The angle comes from the sum and the difference of unit vectors: a cosine near 1 has no digits
    left for small angles. A row of zeros has no direction and does not count.
    """

    def init(self) -> tuple[float, int]:
        """The state before any input: the sum of angles, and of how many rows."""
        return 0.0, 0

    def update(self, state: tuple[float, int], before: Tensor, after: Tensor) -> tuple[float, int]:
        """Add rows (count, width) before and after; raises UsageError for unequal shapes."""
        if before.dim() != 2 or before.shape != after.shape:
            raise UsageError(
                f"angles are between rows of one width, not {tuple(before.shape)} and "
                f"{tuple(after.shape)}"
            )
        a, b = before.double(), after.double()
        lengths = torch.stack((a.norm(dim=1), b.norm(dim=1)))
        some = (lengths > 0).all(dim=0)
        a, b = a[some] / lengths[0, some, None], b[some] / lengths[1, some, None]
        halves = torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))
        return state[0] + float(halves.sum()) * 2 / math.pi, state[1] + len(halves)

    def merge(self, a: tuple[float, int], b: tuple[float, int]) -> tuple[float, int]:
        """The state that saw both streams."""
        return a[0] + b[0], a[1] + b[1]

    def finalize(self, state: tuple[float, int], name: str) -> BlockStats:
        """Statistics of the block `name`."""
        return BlockStats(name, state[1], state[0] / max(1, state[1]))


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
