"""Layers that hold only kept weights while they train: no dense weight, gradient or mask exists."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gossamer.core.density import check_density, kept_count
from gossamer.core.errors import UsageError
from gossamer.ops import csr
from gossamer.ops.csr import Index

Dense = TypeVar("Dense", nn.Linear, nn.Conv2d)
_PARTS = ("splits", "rows", "column_splits", "places")


class SparseLayer(nn.Module, ABC):
    """Kept values of a matrix (out, in) as one parameter, their index as buffers, and a bias.

    values: Parameter (nnz,) float32, in row order, so an optimizer keeps state of kept weights
    only. columns int32 (nnz,) and row_ptr int64 (out + 1) are stored with it; the rest of the
    index is built from them. CPU only.
    """

    values: nn.Parameter
    columns: Tensor
    row_ptr: Tensor
    splits: Tensor
    rows: Tensor
    column_splits: Tensor
    places: Tensor

    def __init__(
        self, positions: Tensor, values: Tensor, shape: tuple[int, int], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.shape = shape
        index = csr.build(positions, shape)
        if values.shape != index.columns.shape:
            raise UsageError(f"{values.numel()} values for {index.columns.numel()} kept weights")
        if bias is not None and bias.shape != (shape[0],):
            raise UsageError(f"bias has shape {tuple(bias.shape)}, not ({shape[0]},)")
        self.values = nn.Parameter(values.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._hold(index)

    @property
    def index(self) -> Index:
        """Where the kept weights are."""
        return Index(
            self.columns, self.splits, self.rows, self.column_splits, self.places, self.shape
        )

    @property
    def positions(self) -> Tensor:
        """int64 (nnz,): row * in + column of each kept weight, ascending."""
        return self.index.positions

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return self.values.numel() / max(1, self.shape[0] * self.shape[1])

    @torch.no_grad()
    def rewire(self, positions: Tensor, carried: Tensor | None = None) -> Tensor:
        """Keep the weights at `positions` (ascending) from now on, in place; O(nnz log nnz).

        A weight kept before and now keeps its value; others begin at zero. carried: bool (nnz,),
        to carry over only these of the old weights. Returns int64 (new nnz,), where each was among
        the old weights, or -1: `carry` moves whatever else has the values' shape. The gradient is
        dropped. Raises UsageError, nothing changed, for positions that do not fit.
        """
        index = csr.build(positions, self.shape)
        old, count = self.positions, self.values.numel()
        place = torch.searchsorted(old, positions).clamp(max=max(0, count - 1))
        same = old[place] == positions if count else torch.zeros_like(positions, dtype=torch.bool)
        if carried is not None and count:
            same &= carried[place]
        origin = place.masked_fill(~same, -1)
        self.values.data = carry(self.values.data, origin)
        self.values.grad = None
        self._hold(index)
        return origin

    def to_matrix(self) -> Tensor:
        """The dense weight (out, in), detached; for export."""
        matrix = self.values.new_zeros(self.shape)
        matrix.view(-1)[self.positions] = self.values.detach()
        return matrix

    @abstractmethod
    def as_rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """An input and an output of the layer as (rows, in) and (rows, out)."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """An ordinary layer with the same function."""

    def _hold(self, index: Index) -> None:
        counts = index.splits[-1] - index.splits[0]
        row_ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.register_buffer("columns", index.columns)
        self.register_buffer("row_ptr", row_ptr)
        for name in _PARTS:
            self.register_buffer(name, getattr(index, name), persistent=False)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Another topology, of another count too, is taken over; a wrong one is an error."""
        names = ("values", "columns", "row_ptr")
        parts = [x for name in names if isinstance(x := state_dict.get(prefix + name), Tensor)]
        if len(parts) == len(names):
            values, columns, row_ptr = parts
            try:
                index = csr.build(_positions(columns, row_ptr, self.shape), self.shape)
                if values.shape != columns.shape:
                    raise UsageError(f"{values.numel()} values for {columns.numel()} kept weights")
            except UsageError as error:
                error_msgs.append(f"{prefix[:-1]}: {error}")
                return
            if values.shape != self.values.shape:
                self.values.data = self.values.new_zeros(values.shape)
            self._hold(index)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class SparseLinear(SparseLayer):
    """y = x W^T + b with a matrix W (out, in) of which only the kept weights exist."""

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        density: float,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> SparseLinear:
        """Weights at random places; values and bias drawn as nn.Linear draws them."""
        return cls(*_fresh((out_features, in_features), density, bias, generator))

    @classmethod
    def from_linear(cls, linear: nn.Linear, positions: Tensor | None = None) -> SparseLinear:
        """The weights of a Linear at `positions`, by default those that are not zero."""
        return cls(*_taken(linear.weight, positions), linear.bias)

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        return csr.linear(x, self.values, self.index, self.bias)

    def as_rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Leading dimensions made one."""
        return x.reshape(-1, self.shape[1]), y.reshape(-1, self.shape[0])

    def to_dense(self) -> nn.Linear:
        """A Linear with zeros."""
        linear = nn.Linear(*self.shape[::-1], bias=self.bias is not None, device="meta")
        return _given(linear, self.to_matrix(), self.bias)

    def extra_repr(self) -> str:
        """Shape and density."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {_said(self)}"


class SparseConv2d(SparseLayer):
    """A convolution of kernel 1x1, no padding and one group; W is (out, in channels)."""

    def __init__(
        self,
        positions: Tensor,
        values: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None,
        stride: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__(positions, values, shape, bias)
        self.stride = stride

    @classmethod
    def random(
        cls,
        in_channels: int,
        out_channels: int,
        density: float,
        stride: int = 1,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> SparseConv2d:
        """Weights at random places; values and bias drawn as nn.Conv2d draws them."""
        parts = _fresh((out_channels, in_channels), density, bias, generator)
        return cls(*parts, (stride, stride))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, positions: Tensor | None = None) -> SparseConv2d:
        """The weights of a 1x1 Conv2d at `positions`, by default those that are not zero.

        Raises UsageError for another kernel, padding or grouping.
        """
        if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.padding not in ((0, 0), "valid"):
            raise UsageError(f"only a 1x1 convolution without padding trains sparsely, not {conv}")
        stride = (conv.stride[0], conv.stride[1])
        return cls(*_taken(conv.weight.flatten(1), positions), conv.bias, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in, height, width) to (batch, out, ...), or without the batch."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.shape[1]:
            raise UsageError(f"expected {self.shape[1]} channels of images, not {tuple(x.shape)}")
        return csr.linear(self._places(x), self.values, self.index, self.bias).movedim(-1, -3)

    def as_rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One row for each image and place."""
        rows = y.movedim(-3, -1).reshape(-1, self.shape[0])
        return self._places(x).reshape(-1, self.shape[1]), rows

    def _places(self, x: Tensor) -> Tensor:
        """Channels last, of the places that the stride reaches."""
        return x[..., :: self.stride[0], :: self.stride[1]].movedim(-3, -1)

    def to_dense(self) -> nn.Conv2d:
        """A Conv2d with zeros."""
        out, channels = self.shape
        bias = self.bias is not None
        conv = nn.Conv2d(channels, out, 1, self.stride, bias=bias, device="meta")
        return _given(conv, self.to_matrix()[:, :, None, None], self.bias)

    def extra_repr(self) -> str:
        """Shape and density."""
        return f"{self.shape[1]}, {self.shape[0]}, stride={self.stride}, {_said(self)}"


def carry(tensor: Tensor, origin: Tensor) -> Tensor:
    """(new nnz,): tensor[origin], zero where origin is -1."""
    if not tensor.numel():
        return tensor.new_zeros(origin.shape)
    return tensor[origin.clamp(min=0)].masked_fill_(origin < 0, 0)


def random_positions(
    count: int, size: int, generator: torch.Generator | None = None, taken: Tensor | None = None
) -> Tensor:
    """`count` of the numbers below `size`, none of `taken` (ascending), each set of them equally
    likely; ascending. Expected O(count) where half of all are free. Raises UsageError where fewer
    are free."""
    chosen = torch.empty(0, dtype=torch.int64)
    taken = chosen if taken is None else taken
    if count > size - taken.numel():
        raise UsageError(f"only {size - taken.numel()} of {size} weights are free, not {count}")
    while left := count - chosen.numel():
        drawn = torch.randint(size, (left + left // 4 + 8,), generator=generator).unique()
        fresh = drawn[~(_among(drawn, taken) | _among(drawn, chosen))]
        if fresh.numel() > left:  # a random part: the lowest ones would be no fair draw
            fresh = fresh[torch.randperm(fresh.numel(), generator=generator)[:left]]
        chosen = torch.cat([chosen, fresh]).sort().values
    return chosen


def _among(numbers: Tensor, ascending: Tensor) -> Tensor:
    """bool: which of the numbers are in the other tensor."""
    if not ascending.numel():
        return torch.zeros_like(numbers, dtype=torch.bool)
    place = torch.searchsorted(ascending, numbers).clamp(max=ascending.numel() - 1)
    return ascending[place] == numbers


def _fresh(
    shape: tuple[int, int], density: float, bias: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, tuple[int, int], Tensor | None]:
    """Random positions, and numbers as nn.Linear draws them, without drawing the others."""
    out, width = shape
    if out < 1 or width < 1:
        raise UsageError(f"a layer needs inputs and outputs, not a weight of shape {shape}")
    count = kept_count(out * width, check_density(density))
    if count == 0:
        raise UsageError(f"density {density:g} leaves no weight of {out * width}")
    positions = random_positions(count, out * width, generator)
    bound = 1 / math.sqrt(width)
    values = torch.empty(count).uniform_(-bound, bound, generator=generator)
    start = torch.empty(out).uniform_(-bound, bound, generator=generator) if bias else None
    return positions, values, shape, start


def _taken(weight: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, int]]:
    flat = weight.detach().reshape(-1)
    positions = flat.nonzero().reshape(-1) if positions is None else positions
    return positions, flat[positions], (weight.shape[0], weight.shape[1])


def _given(dense: Dense, weight: Tensor, bias: Tensor | None) -> Dense:
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().clone())
    return dense


def _said(layer: SparseLayer) -> str:
    return f"density={layer.density:.4f}, bias={layer.bias is not None}"


def _positions(columns: Tensor, row_ptr: Tensor, shape: tuple[int, int]) -> Tensor:
    """Of stored parts; raises UsageError where they contradict each other."""
    if columns.dtype != torch.int32 or row_ptr.dtype != torch.int64 or columns.dim() != 1:
        raise UsageError("columns are int32 and row_ptr int64, in one dimension")
    rising = row_ptr.shape == (shape[0] + 1,) and bool((row_ptr[1:] >= row_ptr[:-1]).all())
    if not rising or int(row_ptr[0]) != 0 or int(row_ptr[-1]) != columns.numel():
        raise UsageError("row_ptr does not divide the columns into rows")
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < shape[1]:
        raise UsageError("a column lies outside the matrix")
    return torch.repeat_interleave(row_ptr.diff()) * shape[1] + columns
