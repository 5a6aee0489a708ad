"""The compiled backend of the bitmap operations: checks, padding and layout around the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.core.errors import FormatError, UsageError
from gossamer.ops._dispatch import compiled, isa_index

MATVEC_ROWS = 8
"""Up to so many rows of x the matrix-vector kernel serves: each weight is read once."""
UNPACK_DENSITY = 0.3
"""Above this density a batch is served by unpacking some rows at a time and multiplying densely,
unless `unpack_from` says from how many rows on."""
_UNPACKED = 1 << 20
"""So many weights are unpacked at a time: 4 MB."""
_SMALL = 1 << 15
"""Below so many kept weights a second thread costs more than it gains."""


def row_offsets(bitmap: Tensor, in_features: int) -> Tensor:
    """int64 (out + 1): where each row's values begin; raises FormatError on padding bits."""
    offsets = torch.empty(bitmap.shape[0] + 1, dtype=torch.int64)
    try:
        compiled().bitmap_offsets(bitmap, in_features, offsets)
    except ValueError as error:
        raise FormatError(str(error)) from None
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
    """x (..., in) times the matrix transposed plus bias; accumulates in float32.

    values float32 or bfloat16, contiguous; row_ptr from `row_offsets`, columns from `columns_of`.
    O(rows of x * nnz), for up to 8 rows without columns O(out * in).
    """
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.detach().float()
    rows = x.numel() // max(1, in_features)
    if rows <= MATVEC_ROWS and x.dtype in (torch.float32, torch.bfloat16):
        return _matvec(x, values, bitmap, row_ptr, bias, rows, columns)
    inputs = x.reshape(-1, in_features).float()
    density = values.numel() / max(1, bitmap.shape[0] * in_features)
    dense = unpacks(rows, density, unpack_from)
    if dense and math.isfinite(inputs.sum().item()):  # 0 * NaN would reach rows that keep nothing
        result = _unpacked(inputs, values, bitmap, row_ptr, bias)
        return result.to(x.dtype).reshape(*x.shape[:-1], bitmap.shape[0])
    if (padded := bitmap.shape[1] * 8) != in_features:
        inputs = functional.pad(inputs, (0, padded - in_features))
    result = _spmm(inputs, values, bitmap, row_ptr, bias)
    return result.to(x.dtype).reshape(*x.shape[:-1], bitmap.shape[0])


def unpacks(rows: int, density: float, unpack_from: int | None) -> bool:
    """Whether so many rows of input, more than `MATVEC_ROWS`, are multiplied by unpacked weights."""
    return density > UNPACK_DENSITY if unpack_from is None else rows >= unpack_from


def columns_of(bitmap: Tensor, row_ptr: Tensor) -> Tensor:
    """uint16 (nnz,): the column of every kept weight. O(out * in / 64 + nnz)."""
    columns = torch.empty(int(row_ptr[-1]), dtype=torch.uint16)
    compiled().bitmap_columns(bitmap, row_ptr, columns)
    return columns


def unpack(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Tensor:
    """The dense matrix (out, in) in float32."""
    matrix = torch.empty(bitmap.shape[0], in_features)
    _unpack_rows(values, bitmap, row_ptr, 0, matrix)
    return matrix


def _matvec(
    x: Tensor, values: Tensor, bitmap: Tensor, row_ptr: Tensor, bias: Tensor | None, rows: int,
    columns: Tensor | None,
) -> Tensor:  # fmt: skip
    """One call does it all: no tensor operation around the kernel, for the sake of small layers."""
    if not x.is_contiguous():
        x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], bitmap.shape[0]))
    if y.numel():
        matrix = compiled().BitmapMatrix(bitmap, values, row_ptr, columns, x.shape[-1])
        matrix.matvec(x, y, bias, _threads(values.numel() * rows), isa_index())
    return y


def _unpacked(
    x: Tensor, values: Tensor, bitmap: Tensor, row_ptr: Tensor, bias: Tensor | None
) -> Tensor:
    """x (rows, in) float32; dense products with blocks of rows that stay in the cache."""
    out, in_features = bitmap.shape[0], x.shape[1]
    x = x.contiguous()
    y = torch.empty(x.shape[0], out)
    step = max(1, _UNPACKED // max(1, in_features))
    scratch = torch.empty(min(step, out), in_features)
    for first in range(0, out, step):
        last = min(out, first + step)
        rows = scratch[: last - first]
        _unpack_rows(values, bitmap, row_ptr, first, rows)
        if bias is None:
            torch.mm(x, rows.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, rows.t(), out=y[:, first:last])
    return y


def _unpack_rows(values: Tensor, bitmap: Tensor, row_ptr: Tensor, first: int, out: Tensor) -> None:
    """As many rows as `out` (rows, in) float32 has, from `first` on."""
    matrix = compiled().BitmapMatrix(bitmap, values, row_ptr, None, out.shape[1])
    matrix.unpack(first, out, _threads(out.numel()), isa_index())


def _spmm(
    x: Tensor, values: Tensor, bitmap: Tensor, row_ptr: Tensor, bias: Tensor | None
) -> Tensor:
    """Whole tiles of 64 rows of x, then one narrower tile for the rest."""
    out, rows = bitmap.shape[0], x.shape[0]
    whole = rows // 64 * 64
    parts = [_tiles(x[:whole], 64, values, bitmap, row_ptr, bias)] if whole else []
    if rows > whole:
        width = (rows - whole + 15) // 16 * 16
        rest = functional.pad(x[whole:], (0, 0, 0, width - (rows - whole)))
        parts.append(_tiles(rest, width, values, bitmap, row_ptr, bias)[: rows - whole])
    return parts[0] if len(parts) == 1 else torch.cat(parts).reshape(rows, out)


def _tiles(
    x: Tensor,
    width: int,
    values: Tensor,
    bitmap: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
) -> Tensor:
    tiles, out = x.shape[0] // width, bitmap.shape[0]
    xt = x.reshape(tiles, width, -1).transpose(1, 2).contiguous()
    yt = torch.empty(tiles, out, width)
    cursor = torch.empty(out, dtype=torch.int64)
    matrix = compiled().BitmapMatrix(bitmap, values, row_ptr, None, x.shape[1])
    matrix.spmm(xt, yt, bias, cursor, _threads(values.numel() * x.shape[0]), isa_index())
    # contiguous of one tile too, where reshape alone would give a view: compilers rely on strides
    return yt.transpose(1, 2).contiguous().reshape(tiles * width, out)


def _threads(work: int) -> int:
    return 1 if work < _SMALL else torch.get_num_threads()


def check(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    in_features: int,
) -> None:
    """Raise UsageError where input, bias and packed matrix do not fit each other."""
    if x.shape[-1] != in_features:
        raise UsageError(f"expected inputs of width {in_features}, not {tuple(x.shape)}")
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(f"packed values are float32 or bfloat16, not {values.dtype}")
    if bitmap.dtype != torch.uint8 or bitmap.shape[1] != (in_features + 63) // 64 * 8:
        raise UsageError("bitmap does not fit the number of inputs")
    if row_ptr.dtype != torch.int64 or row_ptr.numel() != bitmap.shape[0] + 1:
        raise UsageError("row offsets do not fit the bitmap")
    if bias is not None and bias.shape != (bitmap.shape[0],):
        raise UsageError(f"bias has shape {tuple(bias.shape)}, not ({bitmap.shape[0]},)")
    if not (values.is_contiguous() and bitmap.is_contiguous() and row_ptr.is_contiguous()):
        raise UsageError("packed values, bitmap and row offsets must be contiguous")
    if not (x.is_cpu and values.is_cpu):
        raise UsageError("the bitmap kernels run on the CPU only")
