"""The compiled backend of the quantised matrices: checks and conversions around the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import ISAS, compiled, isa_index, kernels
from gossamer.ops.quantized.reference import SLACK, outlier_matrix, padded_width, quantize_input

if TYPE_CHECKING:
    from gossamer.ops.quantized import QuantizedMatrix

MATVEC_ROWS = 8
"""Up to so many rows of x the matrix-vector kernel serves."""
_UNPACKED = 1 << 20
"""So many weights are unpacked at a time: 4 MB."""
_SMALL = 1 << 15
"""Below so many stored bytes a second thread costs more than it gains."""


def compiled_matrix(m: QuantizedMatrix) -> Any:
    """The matrix as the compiled module holds it, with its tensors."""
    parts = (m.values, m.offsets, m.bitmap, m.scales, m.zeros, *(m.outliers or (None, None, None)))
    return compiled().QuantizedMatrix(*parts, m.shape[1], m.group, m.bits, m.balanced)


def linear(x: Tensor, m: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """x (..., in) times the matrix transposed plus bias; sums in float32.

    The inputs are rounded to 8-bit integers, scaled per 128. Processors without byte dot products
    multiply more than 8 rows of them, as float32, by weights unpacked piece by piece.
    """
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.detach().float()
    rows = x.numel() // max(1, m.shape[1])
    if rows <= MATVEC_ROWS and x.dtype in (torch.float32, torch.bfloat16):
        return _matvec(x.contiguous(), m, bias, rows)
    flat = x.reshape(-1, m.shape[1]).float().contiguous()
    if ISAS[isa_index()] == "avx512" and has_byte_products():
        result = _matmul(flat, m, bias)
    else:
        result = _unpacked(flat, m, bias)
    return result.to(x.dtype).reshape(*x.shape[:-1], m.shape[0])


def unpack(m: QuantizedMatrix) -> Tensor:
    """The dense matrix (out, in) in float32."""
    matrix = torch.empty(m.shape)
    _rows(m, 0, matrix)
    return matrix


def densify(m: QuantizedMatrix) -> Tensor:
    """The values of the same matrix dense: the zero point where nothing is kept."""
    rows = -(-m.shape[0] // 2) if m.bits == 4 else m.shape[0]
    values = torch.empty(rows * padded_width(m.shape[1]) + SLACK, dtype=torch.uint8)
    values[-SLACK:] = 0
    threads = 1 if values.numel() < _SMALL else torch.get_num_threads()
    compiled_matrix(m).densify(values, threads, isa_index())
    return values


def has_byte_products() -> bool:
    """Whether the processor multiplies bytes into 32-bit sums (AVX-512 VNNI)."""
    module = kernels()
    return module is not None and bool(module.has_vnni())


def _matvec(x: Tensor, m: QuantizedMatrix, bias: Tensor | None, rows: int) -> Tensor:
    y = x.new_empty((*x.shape[:-1], m.shape[0]))
    if y.numel():
        threads = 1 if m.values.numel() * rows < _SMALL else torch.get_num_threads()
        compiled_matrix(m).matvec(x, y, bias, threads, isa_index())
    return y


def _matmul(x: Tensor, m: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    y = torch.empty(x.shape[0], m.shape[0])
    if y.numel():
        compiled_matrix(m).matmul(x, y, bias, torch.get_num_threads(), isa_index())
    return y


def _unpacked(x: Tensor, m: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    out, width = m.shape
    rounded = quantize_input(x)
    y = torch.empty(x.shape[0], out)
    step = max(2, _UNPACKED // max(1, width))
    scratch = torch.empty(min(step, out), width)
    for first in range(0, out, step):
        last = min(out, first + step)
        rows = scratch[: last - first]
        _rows(m, first, rows)
        if bias is None:
            torch.mm(rounded, rows.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], rounded, rows.t(), out=y[:, first:last])
    if m.outliers is not None:  # which meet the inputs as they were
        y += (x - rounded) @ outlier_matrix(m.outliers, m.shape).t()
    return y


def _rows(m: QuantizedMatrix, first: int, out: Tensor) -> None:
    threads = 1 if out.numel() < _SMALL else torch.get_num_threads()
    compiled_matrix(m).unpack(first, out, threads, isa_index())
