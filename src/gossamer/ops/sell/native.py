"""The compiled backend of the SELL operations."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops._dispatch import compiled, isa_index
from gossamer.ops.sell.reference import BATCH, COLUMNS, Parts, chunk_rows

_SMALL = 1 << 15
"""Below so many multiplications a second thread costs more than it gains."""


def build(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Parts:
    """values, columns, rows, groups, offsets: see `Sell`."""
    module = compiled()
    out = bitmap.shape[0]
    chunk, blocks = chunk_rows(out), -(-in_features // COLUMNS)
    offsets = torch.empty(-(-out // chunk) * blocks + 1, 4, dtype=torch.int64)
    module.sell_count(bitmap, in_features, chunk, offsets)
    sizes = offsets[-1].tolist()
    groups = torch.empty(sizes[0], 3, dtype=torch.uint16)
    rows = torch.empty(sizes[1], dtype=torch.uint16)
    columns = torch.empty(sizes[2], dtype=torch.uint8)
    kept = values.new_zeros(sizes[3] + 1)
    matrix = (bitmap, values, row_ptr, in_features)
    module.sell_fill(*matrix, chunk, offsets, groups, rows, columns, kept)
    return kept, columns, rows, groups, offsets


def linear(
    x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None, relu: bool
) -> Tensor:
    """One call: turning x, product, bias, ReLU and turning back."""
    out, in_features = shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    if not y.numel():
        return y
    batch = y.numel() // out
    if bias is not None:
        bias = bias.detach().float().contiguous()
    chunk, blocks = chunk_rows(out), -(-in_features // COLUMNS)
    threads = 1 if parts[0].numel() * batch < _SMALL else torch.get_num_threads()
    width = min(BATCH, -(-batch // 16) * 16)
    xt = torch.empty(max(16, blocks * (COLUMNS + 1) * width))
    yt = torch.empty(threads * (chunk + 1) * BATCH)
    matrix = compiled().SellMatrix(*parts, out, in_features, chunk)
    matrix.linear(x, y, bias, relu, xt, yt, threads, isa_index())
    return y
