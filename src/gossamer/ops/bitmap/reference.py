"""Bitmap storage in plain torch: the reference that every kernel is tested against.

A matrix (out, in) is stored as `bitmap` uint8 (out, 8 * ceil(in / 64)), bit j of a row at byte
j // 8, bit j % 8, padding bits zero, and `values` (nnz,), the kept weights in row order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError

_BITS = 8


def bitmap_bytes(in_features: int) -> int:
    """Bytes of bitmap per row: whole 64-bit words."""
    return (in_features + 63) // 64 * 8


def pack(matrix: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values, bitmap) of the non-zeros of `matrix` (out, in), or of the positions in `mask`.

    values keep the matrix's dtype. O(out * in).
    """
    if matrix.dim() != 2:
        raise UsageError(f"only a matrix can be packed, not shape {tuple(matrix.shape)}")
    mask = matrix != 0 if mask is None else mask
    rows, cols = matrix.shape
    padded = torch.zeros(rows, bitmap_bytes(cols) * _BITS, dtype=torch.uint8)
    padded[:, :cols] = mask
    weights = torch.tensor([1 << bit for bit in range(_BITS)], dtype=torch.uint8)
    bitmap = (padded.reshape(rows, -1, _BITS) * weights).sum(dim=-1, dtype=torch.uint8)
    return matrix.detach()[mask], bitmap


def unpack_mask(bitmap: Tensor, in_features: int) -> Tensor:
    """The bitmap as bool (out, in); raises FormatError where a padding bit is set."""
    shifts = torch.arange(_BITS, dtype=torch.uint8)
    bits = bitmap.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).bool()
    bits = bits.reshape(bitmap.shape[0], -1)
    if bool(bits[:, in_features:].any()):
        raise FormatError("bitmap: a padding bit is set")
    return bits[:, :in_features]


def unpack(values: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    """The dense matrix (out, in) in the dtype of `values`. O(out * in)."""
    mask = unpack_mask(bitmap, in_features)
    matrix = torch.zeros(mask.shape, dtype=values.dtype)
    return matrix.masked_scatter(mask, values)


def row_offsets(bitmap: Tensor, in_features: int) -> Tensor:
    """int64 (out + 1): where each row's values begin."""
    counts = unpack_mask(bitmap, in_features).sum(dim=1)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def linear(
    x: Tensor, values: Tensor, bitmap: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """x (..., in) times the matrix transposed, plus bias (out,); in float32, cast to x's dtype.

    Columns that a row does not keep never touch its result, even where x is NaN.
    """
    matrix = unpack(values, bitmap, in_features).float()
    inputs = x.float()
    finite = torch.nan_to_num(inputs, nan=0.0, posinf=0.0, neginf=0.0)
    result = finite @ matrix.t()
    if bool((odd := ~torch.isfinite(inputs)).any()):
        keeps = unpack_mask(bitmap, in_features)
        for *row, column in odd.nonzero().tolist():
            at = (*row, keeps[:, column])
            result[at] += inputs[(*row, column)] * matrix[keeps[:, column], column]
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)
