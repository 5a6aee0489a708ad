"""The compiled home of the pattern-grouped operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels
from gossamer.ops.grouped.reference import BLOCK, TILE, Parts

_SMALL = 1 << 15
"""Below so many multiplications a second thread costs more than it gains."""


def build(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Parts:
    """values, columns, counts, column_ptr, value_ptr: see `Grouped`."""
    module = _module()
    out, stride = bitmap.shape
    blocks, tiles = -(-in_features // BLOCK), -(-out // TILE)
    counts = torch.empty(blocks, tiles, 16, dtype=torch.uint16)
    column_ptr = torch.empty(blocks * tiles + 1, dtype=torch.int64)
    value_ptr = torch.empty_like(column_ptr)
    matrix = (bitmap.data_ptr(), out, in_features, stride)
    offsets = (counts.data_ptr(), column_ptr.data_ptr(), value_ptr.data_ptr())
    module.grouped_count(*matrix, *offsets)
    columns = torch.empty(int(column_ptr[-1]), dtype=torch.uint16)
    kept = values.new_zeros(int(value_ptr[-1]) + 1)
    module.grouped_fill(
        bitmap.data_ptr(),
        values.data_ptr(),
        row_ptr.data_ptr(),
        out,
        in_features,
        stride,
        values.dtype == torch.bfloat16,
        *offsets,
        columns.data_ptr(),
        kept.data_ptr() + kept.element_size(),
    )
    return kept, columns, counts, column_ptr, value_ptr


def linear(
    x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None, relu: bool
) -> Tensor:
    """One call: turning x, product, bias, ReLU and turning back."""
    values, columns, counts, column_ptr, value_ptr = parts
    out, in_features = shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    batch = y.numel() // max(1, out)
    if bias is not None:
        bias = bias.detach().float().contiguous()
    xt = torch.empty(max(1, in_features) * 64)
    yt = torch.empty(max(1, -(-out // TILE)) * TILE * 64)
    _module().grouped_linear(
        counts.data_ptr(),
        columns.data_ptr(),
        values.data_ptr() + values.element_size(),
        column_ptr.data_ptr(),
        value_ptr.data_ptr(),
        out,
        in_features,
        values.dtype == torch.bfloat16,
        x.data_ptr(),
        y.data_ptr(),
        batch,
        x.dtype == torch.bfloat16,
        0 if bias is None else bias.data_ptr(),
        relu,
        xt.data_ptr(),
        yt.data_ptr(),
        1 if values.numel() * batch < _SMALL else torch.get_num_threads(),
        isa_index(),
    )
    return y


def _module() -> Any:
    module = kernels()
    assert module is not None
    return module
