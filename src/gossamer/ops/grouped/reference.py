"""The plain twin of the pattern-grouped operations."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops.bitmap.reference import unpack

TILE, BLOCK = 4, 1024
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def build(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Parts:
    """values, columns, counts, column_ptr, value_ptr: see `Grouped`."""
    mask = unpack(torch.ones_like(values), bitmap, in_features) != 0
    matrix = unpack(values, bitmap, in_features)
    rows = -(-matrix.shape[0] // TILE) * TILE
    kept, columns, counts = [values.new_zeros(1)], [], []
    column_ptr, value_ptr = [0], [0]
    for first in range(0, in_features, BLOCK):
        for top in range(0, rows, TILE):
            keeps = mask[top : top + TILE, first : first + BLOCK]
            tile = matrix[top : top + TILE, first : first + BLOCK]
            place = torch.arange(keeps.shape[0]).unsqueeze(1)
            code = (keeps.long() << place).sum(0)
            order = torch.sort(code, stable=True).indices
            order = order[code[order] > 0]
            columns.append(order)
            kept.append(tile[:, order].t()[keeps[:, order].t()])
            counts.append(torch.bincount(code[order], minlength=16))
            column_ptr.append(column_ptr[-1] + order.numel())
            value_ptr.append(value_ptr[-1] + kept[-1].numel())
    shape = (-(-in_features // BLOCK), rows // TILE, 16)
    empty = torch.empty(0, dtype=torch.int64)
    return (
        torch.cat(kept),
        torch.cat([*columns, empty]).to(torch.uint16),
        torch.cat([*counts, empty]).to(torch.uint16).reshape(shape),
        torch.tensor(column_ptr),
        torch.tensor(value_ptr),
    )


def to_matrix(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """The dense matrix (out, in), by following the form's own definition."""
    values, columns, counts, column_ptr, value_ptr = parts
    tiles = counts.shape[1]
    matrix = values.new_zeros(tiles * TILE, shape[1])
    for at, row in enumerate(counts.reshape(-1, 16).long().tolist()):
        column, value = int(column_ptr[at]), int(value_ptr[at]) + 1
        for code, count in enumerate(row):
            rows = [r for r in range(TILE) if code >> r & 1]
            for _ in range(count):
                j = at // tiles * BLOCK + int(columns[column])
                for r in rows:
                    matrix[at % tiles * TILE + r, j] = values[value]
                    value += 1
                column += 1
    return matrix[: shape[0]]


def linear(
    x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None, relu: bool
) -> Tensor:
    """x W^T + bias through the dense matrix; columns that a row does not keep count as zero."""
    matrix = to_matrix(parts, shape).float()
    rows = x.reshape(-1, shape[1]).float()
    finite = torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)
    result = finite @ matrix.t()
    if (odd := ~torch.isfinite(rows)).any():
        for row, column in odd.nonzero().tolist():
            keeps = matrix[:, column] != 0
            result[row, keeps] += rows[row, column] * matrix[keeps, column]
    if bias is not None:
        result = result + bias.float()
    result = torch.relu(result) if relu else result
    return result.to(x.dtype).reshape(*x.shape[:-1], shape[0])
