"""Linear layers with a bitmap-packed weight: pack, unpack and multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.ops import _dispatch
from gossamer.ops.bitmap import native, reference
from gossamer.ops.bitmap.reference import bitmap_bytes, pack, unpack, unpack_mask

__all__ = [
    "bitmap_bytes",
    "columns_of",
    "kernel_name",
    "linear",
    "matrix",
    "pack",
    "row_offsets",
    "unpack",
    "unpack_mask",
]
WIDEST = 1 << 16
"""Inputs whose columns fit 16 bits."""


def kernel_name(rows: int = 1, columns: bool = False) -> str:
    """The kernel that serves `rows` rows of input here, such as `bitmap-matvec/avx512`."""
    if rows <= native.MATVEC_ROWS and columns:
        return f"csr-matvec/{_dispatch.isa()}"
    kind = "matvec" if rows <= native.MATVEC_ROWS else "spmm"
    return f"bitmap-{kind}/{_dispatch.isa()}"


def columns_of(bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Tensor:
    """uint16 (nnz,): the column of every kept weight, for `linear`; at most `WIDEST` inputs."""
    if in_features > WIDEST:
        raise UsageError(f"columns of {in_features} inputs do not fit 16 bits")
    if _dispatch.kernels() is None:
        return unpack_mask(bitmap, in_features).nonzero()[:, 1].to(torch.uint16)
    return native.columns_of(bitmap.contiguous(), row_ptr)


def row_offsets(values: Tensor | None, bitmap: Tensor, in_features: int) -> Tensor:
    """int64 (out + 1) offsets of each row's values; values None: their number is not checked.

    Raises FormatError where shapes, padding bits or the number of values contradict the bitmap:
    kernels trust what has passed here.
    """
    flat = values is None or values.dim() == 1
    if bitmap.dtype != torch.uint8 or bitmap.dim() != 2 or not flat:
        raise FormatError("bitmap is uint8 (out, bytes) and values one-dimensional")
    if bitmap.shape[1] != bitmap_bytes(in_features):
        raise FormatError(
            f"bitmap has {bitmap.shape[1]} bytes per row; {in_features} inputs need "
            f"{bitmap_bytes(in_features)}"
        )
    bitmap = bitmap.contiguous()
    backend = reference if _dispatch.kernels() is None else native
    offsets = backend.row_offsets(bitmap, in_features)
    if values is not None and int(offsets[-1]) != values.numel():
        raise FormatError(f"bitmap keeps {int(offsets[-1])} weights but holds {values.numel()}")
    return offsets


def linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    in_features: int,
    unpack_from: int | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """x (..., in) times the packed matrix transposed, plus bias (out,).

    x of any float dtype, the result in the same; sums in float32. The matrix-vector kernel serves
    up to 8 rows, the tiled one more. Differentiable in x and bias, at the memory of one dense
    weight. Columns that a row does not keep never touch its result, even where x is NaN. Without
    `unpack_from`, the rows from which unpacking for a dense product pays, the density decides.
    With `columns` of the kept weights, up to 8 rows take time by these alone, not by all positions.
    """
    if _dispatch.direct(x, bias):
        return _forward(x, values, bitmap, row_ptr, bias, in_features, unpack_from, columns)
    return _bitmap_linear(x, values, bitmap, row_ptr, bias, in_features, unpack_from, columns)


def _forward(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    in_features: int,
    unpack_from: int | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    native.check(x, values, bitmap, row_ptr, bias, in_features)
    if _dispatch.isa_index() < 0:
        return reference.linear(x, values, bitmap, bias, in_features)
    return native.linear(x, values, bitmap, row_ptr, bias, in_features, unpack_from, columns)


@torch.library.custom_op("gossamer::bitmap_linear", mutates_args=())
def _bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    in_features: int,
    unpack_from: int | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    result = _forward(x, values, bitmap, row_ptr, bias, in_features, unpack_from, columns)
    return _dispatch.owned(result)


@_bitmap_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    in_features: int,
    unpack_from: int | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], bitmap.shape[0])


@torch.library.custom_op("gossamer::bitmap_unpack", mutates_args=())
def _unpack(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Tensor:
    served = values.dtype in (torch.float32, torch.bfloat16) and values.is_cpu
    if _dispatch.isa_index() < 0 or not served:
        return reference.unpack(values, bitmap, in_features)
    return native.unpack(values, bitmap, row_ptr, in_features).to(values.dtype)


@_unpack.register_fake
def _(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Tensor:
    return values.new_empty(bitmap.shape[0], in_features)


def matrix(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Tensor:
    """`unpack` by the kernel, which compilers may record; row_ptr from `row_offsets`."""
    return _unpack(values, bitmap, row_ptr, in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, bitmap, row_ptr, bias, in_features, _, _ = inputs
    ctx.save_for_backward(values, bitmap, row_ptr)
    ctx.in_features, ctx.bias = in_features, bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        dense = _unpack(*ctx.saved_tensors, ctx.in_features)
        grad_x = (grad.float() @ dense.float()).to(grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.bias else None
    return grad_x, None, None, None, grad_bias, None, None, None


_bitmap_linear.register_autograd(_backward, setup_context=_setup)
