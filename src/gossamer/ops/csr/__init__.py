"""Linear layers of compressed rows, whose values train: products, and gradients of kept values.

Only the values change from step to step; the index is built anew when weights are dropped or
grown. Nothing here has the size of the dense matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.csr import native, reference

__all__ = ["Index", "build", "kernel_name", "linear", "sampled"]

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Index:
    """Where the kept weights of a matrix (out, in) are: 12 bytes each, and offsets.

    columns int32 (nnz,), row after row and ascending; splits int64 (blocks + 1, out), the first
    entry of each row at or past every 1024th column. For the transposed matrix: rows int32 (nnz,),
    column after column; column_splits int64 (blocks + 1, in); places int32 (nnz,), where its
    entries' values are among the values in row order. Made by `build`, which is what the kernels
    trust.
    """

    columns: Tensor
    splits: Tensor
    rows: Tensor
    column_splits: Tensor
    places: Tensor
    shape: tuple[int, int]

    @property
    def positions(self) -> Tensor:
        """int64 (nnz,): row * in + column of each weight, ascending."""
        return reference.rows_of(self.splits) * self.shape[1] + self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.columns, self.splits, self.rows, self.column_splits, self.places)
        return sum(part.nbytes for part in parts)


def kernel_name() -> str:
    """The kernel that serves here, such as `csr-spmm/avx512`."""
    return f"csr-spmm/{_dispatch.isa()}"


def build(positions: Tensor, shape: tuple[int, int]) -> Index:
    """The index of the weights at `positions`, int64 (nnz,), row * in + column, ascending.

    O(nnz log nnz). Raises UsageError for positions out of order or range, and for more than
    2^31 - 1 weights, rows or columns.
    """
    out, in_features = shape
    if max(positions.numel(), out, in_features) > _INT32:
        raise UsageError(f"a sparse layer indexes at most {_INT32} weights, rows and columns")
    if positions.dtype != torch.int64 or positions.dim() != 1 or not positions.is_cpu:
        raise UsageError("positions are int64 in one dimension, on the CPU")
    if positions.numel():
        if int(positions[0]) < 0 or int(positions[-1]) >= out * in_features:
            raise UsageError(f"a position lies outside a matrix of shape {tuple(shape)}")
        if not bool((positions[1:] > positions[:-1]).all()):
            raise UsageError("positions must ascend, none twice")
    rows = positions // max(1, in_features)
    columns = positions - rows * in_features
    splits, columns_out = reference.index(rows, columns, (out, in_features)), columns.int()
    # What is no longer needed goes before the sort: each of these is twice the size of the values.
    turned, places = torch.sort(columns.mul_(out).add_(rows))
    del columns
    places_out = places.int()
    del places
    columns_again = torch.div(turned, max(1, out), rounding_mode="floor", out=rows)
    rows_again = turned.sub_(columns_again, alpha=out)
    column_splits = reference.index(columns_again, rows_again, (in_features, out))
    return Index(
        columns_out, splits, rows_again.int(), column_splits, places_out, (out, in_features)
    )


def linear(x: Tensor, values: Tensor, index: Index, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the matrix transposed, plus bias (out,); differentiable in all three.

    values (nnz,) float32, in the order of the index; the result has x's dtype, and sums are
    float32. O(rows of x * nnz), as is the backward pass: a product with the transposed matrix and
    one sampled at the kept weights. Weights that are not kept touch nothing, even where x is NaN.
    float64 is served by the reference. Raises UsageError for another width or dtype.
    """
    out, in_features = index.shape
    if x.shape[-1] != in_features:
        raise UsageError(f"expected inputs of width {in_features}, not {tuple(x.shape)}")
    if values.shape != index.columns.shape:
        raise UsageError(f"{values.numel()} values for {index.columns.numel()} kept weights")
    if values.dtype not in (torch.float32, torch.float64) or not x.is_floating_point():
        raise UsageError(f"values are float32 and inputs floating, not {values.dtype}, {x.dtype}")
    if not (x.is_cpu and values.is_cpu):
        raise UsageError("the kernels of sparse training run on the CPU only")
    if bias is not None and (bias.shape != (out,) or bias.dtype != values.dtype):
        raise UsageError(f"bias is {bias.dtype} {tuple(bias.shape)}, not {values.dtype} ({out},)")
    i, inputs = index, x.to(values.dtype)
    if _dispatch.direct(x, values, bias):
        return _forward(inputs, values, bias, i.columns, i.splits).to(x.dtype)
    y = _csr_linear(inputs, values, bias, i.columns, i.splits, i.rows, i.column_splits, i.places)
    return y.to(x.dtype)


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, columns: Tensor, splits: Tensor
) -> Tensor:
    if _compiled(values):
        return native.linear(x, values, None, columns, splits, bias)
    return reference.linear(x, values, columns, splits, bias)


def sampled(x: Tensor, dy: Tensor, index: Index) -> Tensor:
    """(nnz,): for each kept weight the sum over the batch of dy[., row] * x[., column].

    x (..., in) and dy (..., out), both float32 or both float64. O(rows of x * nnz).
    """
    if x.shape[-1:] + dy.shape[-1:] != index.shape[::-1] or x.shape[:-1] != dy.shape[:-1]:
        raise UsageError(f"{tuple(x.shape)} and {tuple(dy.shape)} do not fit {index.shape}")
    return _sampled(x, dy, index.columns, index.splits)


def _compiled(values: Tensor) -> bool:
    return values.dtype == torch.float32 and _dispatch.isa_index() >= 0


def _sampled(x: Tensor, dy: Tensor, columns: Tensor, splits: Tensor) -> Tensor:
    backend = native if _compiled(x) else reference
    return backend.sampled(x, dy, columns, splits)


@torch.library.custom_op("gossamer::csr_linear", mutates_args=())
def _csr_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    splits: Tensor,
    rows: Tensor,
    column_splits: Tensor,
    places: Tensor,
) -> Tensor:
    return _dispatch.owned(_forward(x, values, bias, columns, splits))


@_csr_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    splits: Tensor,
    rows: Tensor,
    column_splits: Tensor,
    places: Tensor,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], splits.shape[1])


@torch.library.custom_op("gossamer::csr_grad_x", mutates_args=())
def _grad_x(
    grad: Tensor, values: Tensor, rows: Tensor, column_splits: Tensor, places: Tensor
) -> Tensor:
    if _compiled(values):
        return native.linear(grad, values, places, rows, column_splits, None)
    return reference.linear(grad, values[places.long()], rows, column_splits, None)


@_grad_x.register_fake
def _(grad: Tensor, values: Tensor, rows: Tensor, column_splits: Tensor, places: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], column_splits.shape[1])


@torch.library.custom_op("gossamer::csr_grad_values", mutates_args=())
def _grad_values(x: Tensor, grad: Tensor, columns: Tensor, splits: Tensor) -> Tensor:
    return _sampled(x, grad, columns, splits)


@_grad_values.register_fake
def _(x: Tensor, grad: Tensor, columns: Tensor, splits: Tensor) -> Tensor:
    return x.new_empty(columns.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    x, values, bias, *parts = inputs
    ctx.save_for_backward(x, values, *parts)  # type: ignore[attr-defined]
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, columns, splits, *turned = ctx.saved_tensors  # type: ignore[attr-defined]
    wants_x, wants_values, wants_bias, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_x = _grad_x(grad, values, *turned) if wants_x else None
    grad_values = _grad_values(x, grad, columns, splits) if wants_values else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None
    return grad_x, grad_values, grad_bias, None, None, None, None, None


_csr_linear.register_autograd(_backward, setup_context=_setup)
