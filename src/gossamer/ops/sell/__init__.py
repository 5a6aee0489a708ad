"""Batched products with a sparse matrix in SELL-C-sigma form: see csrc/sell/sell.hpp.

Columns come in blocks of 112, rows in chunks of up to 512, sorted within both by how many columns
they keep and taken four at a time (A unified sparse matrix data format for efficient general
sparse matrix-vector multiplication on modern processors with wide SIMD units, 2014). A copy of the
weights for speed, made from the bitmap form and never stored: with bfloat16 values it takes about
3 bytes per kept weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.sell import native, reference

__all__ = ["Sell", "build", "kernel_name", "linear"]


@dataclass(frozen=True)
class Sell:
    """values (nnz + padding + 1,), the first unused; columns uint8; rows uint16.

    groups: uint16 (groups, 3), shared columns, single columns and fours of rows. offsets: int64
    (chunks * blocks + 1, 4), where groups, rows, columns and values of a chunk and block begin.
    Made by `build`, which is what the kernel trusts.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    groups: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.values, self.columns, self.rows, self.groups, self.offsets)
        return sum(part.nbytes for part in parts)


def kernel_name() -> str:
    """The kernel that serves batches here, such as `sell-spmm/avx512`."""
    return f"sell-spmm/{_dispatch.isa()}"


def build(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Sell:
    """The SELL form of a bitmap-packed matrix; O(out * in / 64 + nnz).

    values float32 or bfloat16; row_ptr from `ops.bitmap.row_offsets`, which checks the bitmap.
    """
    backend = reference if _dispatch.kernels() is None else native
    kept, columns, rows, groups, offsets = backend.build(values, bitmap, row_ptr, in_features)
    return Sell(kept, columns, rows, groups, offsets, (bitmap.shape[0], in_features))


def linear(x: Tensor, weight: Sell, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x (..., in), float32 or bfloat16, times the matrix transposed, plus bias (out,), then ReLU.

    The result has x's dtype; sums are float32. O(rows of x * nnz). Columns that a row does not
    keep never touch its result, even where x is NaN. Not differentiable. Raises UsageError for
    another width or dtype.
    """
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"expected inputs of width {weight.shape[1]}, not {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu:
        raise UsageError(f"inputs are float32 or bfloat16 on the CPU, not {x.dtype} on {x.device}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise UsageError(f"bias has shape {tuple(bias.shape)}, not ({weight.shape[0]},)")
    w = weight
    parts = (w.values, w.columns, w.rows, w.groups, w.offsets)
    if _dispatch.direct(x, bias):
        return _dispatch.backend(reference, native).linear(x, parts, w.shape, bias, relu)
    return _sell_linear(x, *parts, bias, relu, *w.shape)


@torch.library.custom_op("gossamer::sell_linear", mutates_args=())
def _sell_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    groups: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    relu: bool,
    out_features: int,
    in_features: int,
) -> Tensor:
    parts = (values, columns, rows, groups, offsets)
    backend = _dispatch.backend(reference, native)
    return _dispatch.owned(backend.linear(x, parts, (out_features, in_features), bias, relu))


@_sell_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    groups: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    relu: bool,
    out_features: int,
    in_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
