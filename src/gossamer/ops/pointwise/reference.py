"""The plain twin of the sparse 1x1 convolution."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, BLOCK = 128, 128
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def build(matrix: Tensor) -> Parts:
    """values, columns, rows, row_ptr of a matrix (out, in): see `Pointwise`."""
    out, width = matrix.shape
    values, columns, rows, counts = [matrix.new_empty(0)], [], [], []
    for first in range(0, out, ROWS):
        for start in range(0, width, BLOCK):
            tile = matrix[first : first + ROWS, start : start + BLOCK]
            kept = torch.zeros(ROWS, dtype=torch.int64)
            kept[: tile.shape[0]] = (tile != 0).sum(dim=1)
            order = torch.sort(kept, descending=True, stable=True).indices
            sorted_tile = tile[order[order < tile.shape[0]]]
            columns.append(torch.nonzero(sorted_tile)[:, 1])
            values.append(sorted_tile[sorted_tile != 0])
            rows.append(order)
            counts.append(kept[order])
    none = torch.empty(0, dtype=torch.int64)
    row_ptr = torch.cat([none.new_zeros(1), torch.cat([*counts, none]).cumsum(0)])
    return (
        torch.cat(values).contiguous(),
        torch.cat([*columns, none]).to(torch.uint16),
        torch.cat([*rows, none]).to(torch.uint16),
        row_ptr,
    )


def to_matrix(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """The dense matrix (out, in), by following the form's own definition."""
    values, columns, rows, row_ptr = parts
    out, width = shape
    blocks = -(-width // BLOCK)
    matrix = values.new_zeros(-(-out // ROWS) * ROWS, blocks * BLOCK)
    counts = row_ptr[1:] - row_ptr[:-1]
    place = torch.arange(rows.numel()) // ROWS
    row = place // max(1, blocks) * ROWS + rows.long()
    start = place % max(1, blocks) * BLOCK
    matrix[row.repeat_interleave(counts), start.repeat_interleave(counts) + columns.long()] = values
    return matrix[:out, :width]


def conv(
    x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None, low: float, high: float
) -> Tensor:
    """x (images, in, pixels); channels that an output does not keep never touch it."""
    matrix = to_matrix(parts, shape)
    odd = ~torch.isfinite(x)
    y = matrix @ torch.where(odd, 0.0, x)
    for image, channel, pixel in odd.nonzero().tolist():
        keeps = matrix[:, channel] != 0
        y[image, keeps, pixel] += matrix[keeps, channel] * x[image, channel, pixel]
    y = y if bias is None else y + bias.reshape(-1, 1)
    return y.clamp(low, high)
