"""Columns and diagonals of the attention map, from the last queries of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.methods.attention.tiles import from_blocks, with_columns
from gossamer.ops.attention import Layout


def columns_and_offsets(call: AttentionCall, last: int) -> tuple[Tensor, Tensor]:
    """Attention of the last queries summed over each key, and over each offset to the query.

    Two float32 (batch, heads, keys). One head at a time, so that last * keys is the memory.
    """
    batch, heads, queries, _ = call.query.shape
    last = min(last, queries)
    columns = call.query.new_zeros(batch, heads, call.keys, dtype=torch.float32)
    offsets = torch.zeros_like(columns)
    hidden = torch.ones(last, last, dtype=torch.bool, device=call.query.device).triu(1)
    for b in range(batch):
        for h in range(heads):
            query = call.query[b, h, queries - last :].float() * call.scale
            logits = query @ call.key[b, h // call.shared].float().T
            logits[:, call.keys - last :].masked_fill_(hidden, -torch.inf)
            weights = torch.softmax(logits, dim=-1)
            columns[b, h] = weights.sum(0)
            offsets[b, h] = by_offset(weights).sum(0)
    return columns, offsets


def by_offset(weights: Tensor) -> Tensor:
    """(queries, keys) for the last queries, sorted by how far the key lies behind the query.

    Entry (i, o) is the weight of the key o places before query i; 0 where there is none.
    """
    rows, keys = weights.shape
    # Reversed, row i begins rows - 1 - i places late. Rows one entry shorter slide by one each.
    padded = torch.nn.functional.pad(weights.flip(1), (0, rows))
    width = keys + rows - 1
    return padded.flatten()[rows - 1 : rows - 1 + rows * width].unflatten(0, (rows, width))[
        :, :keys
    ]


def columns_and_slashes(
    call: AttentionCall, columns: Tensor, offsets: Tensor, block: int
) -> Layout:
    """The tiles that the kept offsets cross, and the kept columns outside of them.

    columns, offsets: bool (batch, heads, keys).
    """
    tiles = from_blocks(crossed(call, offsets, block), call, block)
    return with_columns(tiles, columns, call, block)


def crossed(call: AttentionCall, offsets: Tensor, block: int) -> Tensor:
    """bool (batch, heads, query blocks, key blocks): tiles with a pair at a kept offset."""
    device = offsets.device
    first = torch.arange(0, call.queries, block, device=device)
    last = (first + block).clamp(max=call.queries) - 1
    edge = torch.arange(0, call.keys, block, device=device)
    end = (edge + block).clamp(max=call.keys) - 1
    nearest = ((first + call.past).unsqueeze(1) - end).clamp(0, call.keys)
    farthest = ((last + call.past).unsqueeze(1) - edge + 1).clamp(0, call.keys)
    kept = torch.nn.functional.pad(offsets.cumsum(-1), (1, 0))
    return kept[..., farthest] > kept[..., nearest.minimum(farthest)]
