"""The compiled home of the SELL operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels
from gossamer.ops.sell.reference import BATCH, COLUMNS, Parts, chunk_rows

_SMALL = 1 << 15
"""Below so many multiplications a second thread costs more than it gains."""


def build(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Parts:
    """values, columns, rows, groups, offsets: see `Sell`."""
    module = _module()
    out, stride = bitmap.shape
    chunk, blocks = chunk_rows(out), -(-in_features // COLUMNS)
    offsets = torch.empty(-(-out // chunk) * blocks + 1, 4, dtype=torch.int64)
    matrix = (out, in_features, stride)
    module.sell_count(bitmap.data_ptr(), *matrix, chunk, offsets.data_ptr())
    sizes = offsets[-1].tolist()
    groups = torch.empty(sizes[0], 3, dtype=torch.uint16)
    rows = torch.empty(sizes[1], dtype=torch.uint16)
    columns = torch.empty(sizes[2], dtype=torch.uint8)
    kept = values.new_zeros(sizes[3] + 1)
    module.sell_fill(
        bitmap.data_ptr(),
        values.data_ptr(),
        row_ptr.data_ptr(),
        *matrix,
        values.dtype == torch.bfloat16,
        chunk,
        offsets.data_ptr(),
        groups.data_ptr(),
        rows.data_ptr(),
        columns.data_ptr(),
        kept.data_ptr() + kept.element_size(),
    )
    return kept, columns, rows, groups, offsets


def linear(
    x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None, relu: bool
) -> Tensor:
    """One call: turning x, product, bias, ReLU and turning back."""
    values, columns, rows, groups, offsets = parts
    out, in_features = shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    batch = y.numel() // max(1, out)
    if bias is not None:
        bias = bias.detach().float().contiguous()
    chunk, blocks = chunk_rows(out), -(-in_features // COLUMNS)
    threads = 1 if values.numel() * batch < _SMALL else torch.get_num_threads()
    width = min(BATCH, -(-batch // 16) * 16)
    xt = torch.empty(max(16, blocks * (COLUMNS + 1) * width))
    yt = torch.empty(threads * (chunk + 1) * BATCH)
    _module().sell_linear(
        groups.data_ptr(),
        rows.data_ptr(),
        columns.data_ptr(),
        values.data_ptr() + values.element_size(),
        offsets.data_ptr(),
        out,
        in_features,
        chunk,
        values.dtype == torch.bfloat16,
        x.data_ptr(),
        y.data_ptr(),
        batch,
        x.dtype == torch.bfloat16,
        0 if bias is None else bias.data_ptr(),
        relu,
        xt.data_ptr(),
        yt.data_ptr(),
        threads,
        isa_index(),
    )
    return y


def _module() -> Any:
    module = kernels()
    assert module is not None
    return module
