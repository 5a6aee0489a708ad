"""Batched products with a sparse matrix in the pattern-grouped form: see csrc/grouped.hpp.

Rows come in tiles of 4, columns in blocks of 1024; within both, columns are sorted by which of the
4 rows keep them. A copy of the weights for speed, made from the bitmap form and never stored: with
bfloat16 values it takes about 3 bytes per kept weight at 50% zeros and 4 at 90%.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.grouped import native, reference

__all__ = ["Grouped", "build", "kernel_name", "linear"]


@dataclass(frozen=True)
class Grouped:
    """values (nnz + 1,), the first unused; columns uint16; counts uint16 (blocks, tiles, 16).

    column_ptr and value_ptr: int64 (blocks * tiles + 1) offsets. Made by `build`, which is what
    the kernel trusts.
    """

    values: Tensor
    columns: Tensor
    counts: Tensor
    column_ptr: Tensor
    value_ptr: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.values, self.columns, self.counts, self.column_ptr, self.value_ptr)
        return sum(part.nbytes for part in parts)


def kernel_name() -> str:
    """The kernel that serves batches here, such as `grouped-spmm/avx512`."""
    return f"grouped-spmm/{_dispatch.isa()}"


def build(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Grouped:
    """The grouped form of a bitmap-packed matrix; O(out * in / 64 + nnz).

    values float32 or bfloat16; row_ptr from `ops.bitmap.row_offsets`, which checks the bitmap.
    """
    home = reference if _dispatch.kernels() is None else native
    kept, columns, counts, column_ptr, value_ptr = home.build(values, bitmap, row_ptr, in_features)
    shape = (bitmap.shape[0], in_features)
    return Grouped(kept, columns, counts, column_ptr, value_ptr, shape)


def linear(x: Tensor, weight: Grouped, bias: Tensor | None = None, relu: bool = False) -> Tensor:
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
    return _grouped_linear(
        x, w.values, w.columns, w.counts, w.column_ptr, w.value_ptr, bias, relu, *w.shape
    )


@torch.library.custom_op("gossamer::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    column_ptr: Tensor,
    value_ptr: Tensor,
    bias: Tensor | None,
    relu: bool,
    out_features: int,
    in_features: int,
) -> Tensor:
    parts = (values, columns, counts, column_ptr, value_ptr)
    shape = (out_features, in_features)
    home = reference if _dispatch.isa_index() < 0 else native
    return home.linear(x, parts, shape, bias, relu)


@_grouped_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    column_ptr: Tensor,
    value_ptr: Tensor,
    bias: Tensor | None,
    relu: bool,
    out_features: int,
    in_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
