"""Matrices of 4- or 8-bit integers, in plain torch: the reference that every kernel is tested against.

A matrix (out, in) is cut, row by row, into groups of `group` consecutive columns. A kept weight is
scale * (q - zero) with q an integer of `bits` bits, one scale (bfloat16) and zero per row and
group; zero is half the range where none are stored. `values` (uint8) holds the kept weights'
integers in row order, a byte each; with 4 bits two rows share their bytes, the even row in the low
halves, the odd one in the high halves, the shorter filled up with zeros. Behind them are 16 bytes
of zeros, which kernels may read. Which columns are kept says a bitmap as in `ops.bitmap`; without
one all are, and every row is filled up to a multiple of 64 with its zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.ops.bitmap import reference as bitmaps

BITS = (4, 8)
WORD = 64
BLOCK = 128
"""Inputs that share a scale."""
_AT_ONCE = 1 << 20
"""So many weights are rounded at a time, so that what the search needs stays in a cache."""
SLACK = 16
"""Bytes behind the values."""


def groups_of(in_features: int, group: int) -> int:
    """How many groups a row has."""
    return -(-in_features // group)


def offsets_of(counts: Tensor, bits: int) -> Tensor:
    """int64: where the values of each row (8 bits) or pair of rows (4 bits) begin, and their end.

    counts: int64 (out,), the kept weights of each row.
    """
    if bits == 4:
        counts = torch.nn.functional.pad(counts, (0, len(counts) % 2)).reshape(-1, 2).amax(dim=1)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def quantize(
    matrix: Tensor, mask: Tensor, bits: int, group: int, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(integers, scales, zeros) of the kept weights of `matrix` (out, in), rounded to nearest.

    integers: uint8 (out, in), anything where `mask` is False. scales: bfloat16 (out, groups), of
    either sign, from a search that minimises the squared error of each group's kept weights.
    zeros: uint8 (out, groups), None if symmetric. Raises UsageError for bits other than 4 or 8 or
    a group that is no power of two from 64 on, NonFiniteError for NaN or infinite weights.
    O(out * in).
    """
    if bits not in BITS:
        raise UsageError(f"bits is 4 or 8, not {bits}")
    if group < WORD or group & (group - 1):
        raise UsageError(f"group is a power of two of at least {WORD}, not {group}")
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("a weight is NaN or infinite, which cannot be quantised")
    step = max(1, _AT_ONCE // max(1, matrix.shape[1]))
    parts = [
        _quantize_rows(matrix[i : i + step].float(), mask[i : i + step], bits, group, symmetric)
        for i in range(0, max(1, matrix.shape[0]), step)
    ]
    integers, scales = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    return integers, scales, None if symmetric else torch.cat([part[2] for part in parts])


def _quantize_rows(
    matrix: Tensor, mask: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = matrix.shape
    count = groups_of(cols, group)
    pad = count * group - cols
    kept = torch.nn.functional.pad(mask, (0, pad)).reshape(rows, count, group)
    weights = torch.nn.functional.pad(matrix, (0, pad)).reshape(rows, count, group)
    weights = weights.masked_fill(~kept, 0)
    search = _symmetric if symmetric else _asymmetric
    scales, zeros = search(weights, kept, bits)
    half = 1 << bits - 1
    low, high = (-half, half - 1) if symmetric else (0, 2 * half - 1)
    integers = _round(weights, scales, zeros, low, high).reshape(rows, -1)[:, :cols]
    stored = scales.squeeze(-1).to(torch.bfloat16)
    if symmetric:
        return (integers + half).to(torch.uint8), stored, zeros
    return integers.to(torch.uint8), stored, zeros.squeeze(-1).to(torch.uint8)


def _round(weights: Tensor, scales: Tensor, zeros: Tensor, low: int, high: int) -> Tensor:
    turn = torch.where(scales == 0, 0.0, 1.0 / scales)
    return (torch.round(weights * turn) + zeros).clamp(low, high)


def _symmetric(weights: Tensor, kept: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The largest weight maps to the longer, negative end or short of it, whichever fits best."""
    half = 1 << bits - 1
    index = weights.abs().argmax(dim=-1, keepdim=True)
    peak = weights.gather(-1, index)
    zeros = torch.zeros(())
    best, least = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
    for divisor in [*torch.linspace(-half * 1.0, -half * 1.35, 8).tolist(), half - 1.0]:
        scales = (peak / divisor).bfloat16().float()
        again = _round(weights, scales, zeros, -half, half - 1) * scales
        error = (again - weights).masked_fill_(~kept, 0).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best, zeros.expand_as(best)


def _asymmetric(weights: Tensor, kept: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The kept weights' range, narrowed where that fits better."""
    top = (1 << bits) - 1
    high = weights.amax(-1, keepdim=True).clamp(min=0)  # zero stays in range, so zeros fit in bits
    low = weights.amin(-1, keepdim=True).clamp(max=0)
    best, best_zero = torch.zeros_like(high), torch.zeros_like(high)
    least = torch.full_like(high, torch.inf)
    for share in torch.linspace(1.0, 0.75, 6).tolist():
        scales = ((high - low) * share / top).bfloat16().float()
        middle = torch.where(scales == 0, 0.0, (high + low) / 2 / scales)
        zeros = torch.round(top / 2 - middle).clamp(0, top)
        again = (_round(weights, scales, zeros, 0, top) - zeros) * scales
        error = (again - weights).masked_fill_(~kept, 0).square_().sum(-1, keepdim=True)
        better = error < least
        best, best_zero = torch.where(better, scales, best), torch.where(better, zeros, best_zero)
        least = torch.minimum(error, least)
    return best, best_zero


def pack(integers: Tensor, counts: Tensor, bits: int) -> Tensor:
    """values of the kept integers (nnz,) in row order, `counts` (out,) of them in each row."""
    offsets = offsets_of(counts, bits)
    values = torch.zeros(int(offsets[-1]) + SLACK, dtype=torch.uint8)
    rows, at = _places(counts, offsets, bits)
    if bits == 8:
        values[at] = integers
        return values
    low, high = rows % 2 == 0, rows % 2 == 1
    values[at[low]] = integers[low]
    values[at[high]] |= integers[high] << 4
    return values


def integers_of(values: Tensor, counts: Tensor, bits: int) -> Tensor:
    """The kept integers, uint8 (nnz,), in row order."""
    rows, at = _places(counts, offsets_of(counts, bits), bits)
    found = values[at]
    return found if bits == 8 else torch.where(rows % 2 == 0, found & 15, found >> 4)


def zero_points(zeros: Tensor | None, shape: tuple[int, int], bits: int, group: int) -> Tensor:
    """uint8 (out, padded in): the integer that stands for 0 at every position."""
    if zeros is None:
        return torch.full((shape[0], padded_width(shape[1])), 1 << bits - 1, dtype=torch.uint8)
    return zeros[:, torch.arange(padded_width(shape[1])) // group]


def densify(
    values: Tensor, bitmap: Tensor, zeros: Tensor | None, shape: tuple[int, int], bits: int,
    group: int,
) -> Tensor:  # fmt: skip
    """The values of the same matrix dense: the zero point where nothing is kept."""
    integers = zero_points(zeros, shape, bits, group)
    mask = bitmaps.unpack_mask(bitmap, shape[1])
    integers[:, : shape[1]][mask] = integers_of(values, mask.sum(dim=1), bits)
    return pack(integers.flatten(), torch.full((shape[0],), integers.shape[1]), bits)


def dense_integers(values: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """The integers, uint8 (out, padded in), of a matrix without a bitmap."""
    whole = values[: len(values) - SLACK].reshape(-1, padded_width(shape[1]))
    if bits == 8:
        return whole
    return torch.stack([whole & 15, whole >> 4], dim=1).flatten(0, 1)[: shape[0]]


def _places(counts: Tensor, offsets: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Row of every kept weight and the byte that holds it."""
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return rows, offsets[rows // 2 if bits == 4 else rows] + rank


def complete(mask: Tensor) -> Tensor:
    """The mask (out, in), with a few positions more where that makes it even in the sense of
    `balanced_of`: one weight that happens to be 0 must not undo a whole matrix's 2:4 pattern.
    """
    if mask.numel() == 0 or mask.shape[1] % WORD or int(mask.sum()) * 2 < 0.95 * mask.numel():
        return mask
    for size in (4, 8):
        groups = mask.reshape(-1, size)
        missing = size // 2 - groups.sum(dim=1, keepdim=True)
        if bool((missing >= 0).all()):
            free = ~groups
            return (groups | (free & (free.cumsum(dim=1) <= missing))).reshape(mask.shape)
    return mask


def balanced_of(bitmap: Tensor | None, in_features: int) -> int:
    """4 if every 4 columns of every row keep exactly 2, 8 if every 8 keep exactly 4, else 0; only
    rows of whole 64-bit words can be either.
    """
    if bitmap is None or bitmap.numel() == 0 or in_features % WORD:
        return 0
    counts = torch.tensor([bin(byte).count("1") for byte in range(16)], dtype=torch.uint8)
    low, high = counts[(bitmap & 15).int()], counts[(bitmap >> 4).int()]
    if bool(((low == 2) & (high == 2)).all()):
        return 4
    return 8 if bool((low + high == 4).all()) else 0


def padded_width(in_features: int) -> int:
    """Columns stored of a dense row."""
    return -(-in_features // WORD) * WORD


def unpack(
    values: Tensor,
    bitmap: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    group: int,
    bits: int,
    outliers: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The dense matrix (out, in) in float32. outliers: row_ptr int64 (out + 1), columns, values."""
    rows = scales.shape[0]
    columns = torch.arange(in_features) // group
    if bitmap is None:
        mask = torch.ones(rows, in_features, dtype=torch.bool)
        integers = dense_integers(values, (rows, in_features), bits)[:, :in_features].float()
    else:
        mask = bitmaps.unpack_mask(bitmap, in_features)
        kept = integers_of(values, mask.sum(dim=1), bits).float()
        integers = torch.zeros(rows, in_features).masked_scatter(mask, kept)
    half = float(1 << bits - 1)
    integers = integers - (half if zeros is None else zeros.float()[:, columns])
    matrix = (integers * scales.float()[:, columns]).masked_fill(~mask, 0)
    if outliers is not None:
        matrix += outlier_matrix(outliers, (rows, in_features))
    return matrix


def quantize_input(x: Tensor) -> Tensor:
    """x (..., in) as the kernels see it: 8-bit integers scaled per 128, as float32 again."""
    width = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    top = blocks.abs().amax(dim=-1, keepdim=True)
    # torch takes 127.0 / top by the reciprocal of top, which rounds twice
    turn = torch.where(top > 0, torch.full_like(top, 127.0) / top, 0.0)
    rounded = torch.round(blocks * turn).clamp(-127, 127) * (top / 127.0)
    rounded = torch.where(torch.isfinite(blocks).all(-1, keepdim=True), rounded, torch.nan)
    return rounded.flatten(-2)[..., :width]


def outlier_matrix(outliers: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    """The outliers as a dense float32 matrix (out, in)."""
    row_ptr, cols, values = outliers
    at = torch.repeat_interleave(torch.arange(shape[0]), row_ptr.diff())
    return torch.zeros(shape).index_put_((at, cols.long()), values, accumulate=True)


def linear(
    x: Tensor,
    matrix: Tensor,
    outliers: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
) -> Tensor:
    """x (..., in) times the unpacked matrix (out, in) transposed; in x's dtype, sums in float32.

    x is rounded first, except where it meets outliers.
    """
    wide = x.float()
    rounded = quantize_input(x)
    result = rounded @ matrix.t()
    if outliers is not None:
        exact = outlier_matrix(outliers, (matrix.shape[0], matrix.shape[1]))
        result = result + (wide - rounded) @ exact.t()
    return (result if bias is None else result + bias.float()).to(x.dtype)
