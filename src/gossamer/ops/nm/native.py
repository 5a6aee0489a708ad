"""The compiled backend of the N:M operations: checks and conversions around the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.ops._dispatch import compiled, isa_index
from gossamer.ops.nm.reference import Layout

MATVEC_ROWS = 8
"""Up to so many rows of x the matrix-vector kernel serves: each weight is read once."""
_UNPACKED = 1 << 20
"""So many weights are unpacked at a time: 4 MB."""
_SMALL = 1 << 15
"""Below so many stored weights a second thread costs more than it gains."""


def check(values: Tensor, codes: Tensor, layout: Layout) -> None:
    """Raise FormatError where places in a group do not ascend or padding is not zero."""
    try:
        compiled_matrix(values, codes, layout).check()
    except ValueError as error:
        raise FormatError(str(error)) from None


def linear(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """x (..., in) times the matrix transposed plus bias; accumulates in float32.

    Up to 8 rows of x by the matrix-vector kernel, O(rows of x * stored values). More rows: dense
    products with blocks of unpacked rows that stay in the cache, O(rows of x * out * in).
    """
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.detach().float()
    out = values.shape[0]
    inputs = x.reshape(math.prod(x.shape[:-1]), layout.cols).float().contiguous()
    if inputs.shape[0] <= MATVEC_ROWS:
        result = _matvec(inputs, values, codes, bias, layout)
    elif math.isfinite(inputs.sum().item()):  # 0 * NaN would reach rows that keep nothing there
        result = _unpacked(inputs, values, codes, bias, layout)
    else:
        parts = [_matvec(rows, values, codes, bias, layout) for rows in inputs.split(MATVEC_ROWS)]
        result = torch.cat(parts)
    return result.to(x.dtype).reshape(*x.shape[:-1], out)


def unpack(values: Tensor, codes: Tensor, layout: Layout) -> Tensor:
    """The dense matrix (out, in) in float32."""
    dense = torch.empty(values.shape[0], layout.cols)
    _unpack_rows(values, codes, layout, 0, dense)
    return dense


def compiled_matrix(values: Tensor, codes: Tensor, layout: Layout) -> Any:
    """The matrix as the compiled module holds it, with its tensors."""
    return compiled().NmMatrix(codes, values, layout.cols, layout.keep, layout.group)


def _matvec(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    rows = x.shape[0]
    y = torch.empty(rows, values.shape[0])
    if y.numel():
        matrix = compiled_matrix(values, codes, layout)
        matrix.matvec(x, y, bias, _threads(values.numel() * rows), isa_index())
    return y


def _unpacked(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    out = values.shape[0]
    y = torch.empty(x.shape[0], out)
    step = max(1, _UNPACKED // max(1, layout.cols))
    scratch = torch.empty(min(step, out), layout.cols)
    for first in range(0, out, step):
        last = min(out, first + step)
        rows = scratch[: last - first]
        _unpack_rows(values, codes, layout, first, rows)
        if bias is None:
            torch.mm(x, rows.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, rows.t(), out=y[:, first:last])
    return y


def _unpack_rows(values: Tensor, codes: Tensor, layout: Layout, first: int, out: Tensor) -> None:
    matrix = compiled_matrix(values, codes, layout)
    matrix.unpack(first, out, _threads(out.numel()), isa_index())


def _threads(work: int) -> int:
    return 1 if work < _SMALL else torch.get_num_threads()


def check_linear(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, layout: Layout
) -> None:
    """Raise UsageError where input, bias and packed matrix do not fit each other."""
    if x.shape[-1] != layout.cols:
        raise UsageError(f"expected inputs of width {layout.cols}, not {tuple(x.shape)}")
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(f"stored values are float32 or bfloat16, not {values.dtype}")
    sizes = (values.shape[0], layout.blocks * 16), (values.shape[0], layout.code_bytes)
    if codes.dtype != torch.uint8 or (values.shape, codes.shape) != sizes:
        raise UsageError("values or codes do not fit the number of inputs")
    if bias is not None and bias.shape != (values.shape[0],):
        raise UsageError(f"bias has shape {tuple(bias.shape)}, not ({values.shape[0]},)")
    if not (values.is_contiguous() and codes.is_contiguous()):
        raise UsageError("values and codes must be contiguous")
    if not (x.is_cpu and values.is_cpu):
        raise UsageError("the N:M kernels run on the CPU only")
