"""Linear layers with an N:M weight: pack, unpack and multiply. Storage: see reference.py.

The idea of keeping N of every M consecutive weights is that of "Accelerating Sparse Deep Neural
Networks" (2021); the layout here is for processors whose registers permute 16 floats at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.ops import _dispatch
from gossamer.ops.nm import native, reference
from gossamer.ops.nm.reference import GROUPS, Layout

__all__ = ["GROUPS", "Layout", "check", "fits", "kernel_name", "linear", "matrix", "pack", "unpack"]


def kernel_name() -> str:
    """The kernel that serves batch sizes up to 8 here, such as `nm-matvec/avx512`."""
    return f"nm-matvec/{_dispatch.isa()}"


def fits(matrix: Tensor, keep: int, group: int) -> bool:
    """Whether no group of columns of the matrix (out, in) has more than `keep` non-zeros."""
    padded = torch.nn.functional.pad(matrix != 0, (0, -matrix.shape[1] % group))
    return bool((padded.reshape(-1, group).sum(1) <= keep).all())


def pack(matrix: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """(values, codes uint8) of a matrix (out, in); values keep its dtype. O(out * in).

    Raises UsageError for a pattern without kernels, for another shape, and where a group has more
    than `keep` non-zeros; a group with fewer stores zeros.
    """
    if matrix.dim() != 2:
        raise UsageError(f"only a matrix can be packed, not shape {tuple(matrix.shape)}")
    return reference.pack(matrix, Layout(keep, group, matrix.shape[1]))


def unpack(values: Tensor, codes: Tensor, layout: Layout) -> Tensor:
    """The dense matrix (out, in) in the dtype of `values`. O(out * in)."""
    served = values.dtype in (torch.float32, torch.bfloat16) and values.is_cpu
    if _dispatch.isa_index() < 0 or not served:
        return reference.unpack(values, codes, layout)
    return native.unpack(values, codes, layout).to(values.dtype)


def check(values: Tensor, codes: Tensor, layout: Layout) -> None:
    """Raise FormatError where shapes, dtypes, the order of places or the padding are wrong."""
    if codes.dtype != torch.uint8 or codes.dim() != 2 or values.dim() != 2:
        raise FormatError("nm: codes are uint8 (out, bytes) and values (out, stored)")
    rows = values.shape[0]
    if codes.shape != (rows, layout.code_bytes) or values.shape[1] != layout.blocks * 16:
        raise FormatError(
            f"nm: {tuple(codes.shape)} codes and {tuple(values.shape)} values do not make "
            f"{layout.keep}:{layout.group} of {layout.cols} columns"
        )
    served = values.dtype in (torch.float32, torch.bfloat16) and values.is_cpu
    backend = reference if _dispatch.kernels() is None or not served else native
    backend.check(values.contiguous(), codes.contiguous(), layout)


def linear(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """x (..., in) times the packed matrix transposed, plus bias (out,).

    x of any float dtype, the result in the same; sums in float32. Differentiable in x and bias, at
    the memory of one dense weight. Stored zeros count as kept; columns that a row does not store
    never touch its result, even where x is NaN. O(rows of x * stored values) up to 8 rows of x,
    O(rows of x * out * in) for more.
    """
    if _dispatch.direct(x, bias):
        return _forward(x, values, codes, bias, layout)
    return _nm_linear(x, values, codes, bias, layout.keep, layout.group, layout.cols)


def _forward(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    native.check_linear(x, values, codes, bias, layout)
    return _dispatch.backend(reference, native).linear(x, values, codes, bias, layout)


@torch.library.custom_op("gossamer::nm_linear", mutates_args=())
def _nm_linear(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, keep: int, group: int, cols: int
) -> Tensor:
    return _dispatch.owned(_forward(x, values, codes, bias, Layout(keep, group, cols)))


@_nm_linear.register_fake
def _(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, keep: int, group: int, cols: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("gossamer::nm_unpack", mutates_args=())
def _unpack(values: Tensor, codes: Tensor, keep: int, group: int, cols: int) -> Tensor:
    return unpack(values, codes, Layout(keep, group, cols))


@_unpack.register_fake
def _(values: Tensor, codes: Tensor, keep: int, group: int, cols: int) -> Tensor:
    return values.new_empty(values.shape[0], cols)


def matrix(values: Tensor, codes: Tensor, layout: Layout) -> Tensor:
    """`unpack`, which compilers may record."""
    return _unpack(values, codes, layout.keep, layout.group, layout.cols)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, codes, bias, *pattern = inputs
    ctx.save_for_backward(values, codes)
    ctx.pattern, ctx.bias = pattern, bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        dense = _unpack(*ctx.saved_tensors, *ctx.pattern)
        grad_x = (grad.float() @ dense.float()).to(grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.bias else None
    return grad_x, None, None, grad_bias, None, None, None


_nm_linear.register_autograd(_backward, setup_context=_setup)
