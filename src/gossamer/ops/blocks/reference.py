"""The plain reference of the product with blocks."""

from __future__ import annotations

import math

from torch import Tensor

from gossamer.ops.csr.reference import rows_of


def to_matrix(values: Tensor, columns: Tensor, splits: Tensor, in_features: int) -> Tensor:
    """The dense matrix (out, in), block by block; values (blocks, C, R)."""
    width, height = values.shape[1:]
    tall = values.new_zeros(splits.shape[1], in_features // width, width, height)
    tall[rows_of(splits), columns.long() // width] = values
    return tall.permute(0, 3, 1, 2).reshape(-1, in_features)


def linear(
    x: Tensor, values: Tensor, columns: Tensor, splits: Tensor, bias: Tensor | None
) -> Tensor:
    """x (..., in) times the matrix transposed, plus bias; sums in float32, result in x's dtype.

    Blocks that are not kept touch nothing, even where x is NaN.
    """
    width, height = values.shape[1:]
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()
    y = flat.new_zeros(flat.shape[0], splits.shape[1], height)
    rows = rows_of(splits)
    for c in range(width):
        part = flat[:, columns.long() + c]
        y.index_add_(1, rows, part.unsqueeze(-1) * values[:, c].float())
    out = splits.shape[1] * height
    result = y.reshape(flat.shape[0], out)
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype).reshape(*x.shape[:-1], out)
