"""The plain reference of the products with compressed rows: gathers, at the memory of a few rows of x
times the kept weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 1024
"""Columns in a block; the kernels' kCsrBlock."""
_GATHERED = 1 << 22


def index(major: Tensor, minor: Tensor, shape: tuple[int, int]) -> Tensor:
    """int64 (blocks + 1, rows): the first entry of each row at or past column b * BLOCK.

    major, minor: row and column of each entry, in row order and ascending within a row.
    """
    rows, cols = shape
    blocks = -(-cols // BLOCK)
    starts = torch.arange(rows) * (blocks * BLOCK)
    wanted = starts.unsqueeze(0) + (torch.arange(blocks + 1) * BLOCK).unsqueeze(1)
    keys = (major.long() * (blocks * BLOCK)).add_(minor)
    return torch.searchsorted(keys, wanted)


def rows_of(splits: Tensor) -> Tensor:
    """The row of each entry, int64 (nnz,)."""
    return torch.repeat_interleave(splits[-1] - splits[0])


def linear(
    x: Tensor, values: Tensor, columns: Tensor, splits: Tensor, bias: Tensor | None
) -> Tensor:
    """x (..., in) times the matrix transposed, plus bias, in x's dtype."""
    rows, columns = rows_of(splits), columns.long()
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = x.new_zeros(flat.shape[0], splits.shape[1])
    for part, out in _chunks(flat, values.numel(), y):
        out.index_add_(1, rows, part[:, columns] * values)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], splits.shape[1])


def sampled(x: Tensor, dy: Tensor, columns: Tensor, splits: Tensor) -> Tensor:
    """(nnz,): for each entry the sum over the batch of dy[., row] * x[., column]."""
    rows, columns = rows_of(splits), columns.long()
    batch = math.prod(x.shape[:-1])
    x, dy = x.reshape(batch, x.shape[-1]), dy.reshape(batch, dy.shape[-1])
    grad = x.new_zeros(columns.numel())
    for part, other in _chunks(x, columns.numel(), dy):
        grad += (part[:, columns] * other[:, rows]).sum(0)
    return grad


def _chunks(x: Tensor, entries: int, other: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of two tensors, so many at a time that what is gathered stays small."""
    step = max(1, _GATHERED // max(1, entries))
    return list(zip(x.split(step), other.split(step), strict=True)) if x.shape[0] else []
