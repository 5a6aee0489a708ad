"""The best keys of every prefix: what a query may choose among when later tokens are unknown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gossamer.core.budget import TopK
from gossamer.ops.select import keep


def running_top(
    scores: Tensor, count: int, rows: int = 64
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each place, the `count` highest scores up to it: (places, keys, exist), block by block.

    scores: (..., length), one for each key. keys: int64 (..., places, at most count), ascending, and
    bool `exist` of the same shape, False behind the last of fewer keys. Of equal scores the later
    key comes first. Nothing of size length * length is made.
    """
    length = scores.shape[-1]
    places = torch.arange(length, device=scores.device)
    best = places[:0].expand(*scores.shape[:-1], 0)
    for first in range(0, length, rows):
        part = slice(first, min(first + rows, length))
        own = places[part].expand(*scores.shape[:-1], -1)
        candidates = torch.cat([best, own], dim=-1)  # ascending
        visible = candidates.unsqueeze(-2) <= places[part].unsqueeze(-1)
        known = scores.gather(-1, candidates).unsqueeze(-2).expand(visible.shape)
        known = known.masked_fill(~visible, -torch.inf)
        kept = keep(known.flip(-1), TopK(count)).flip(-1) & visible
        order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]
        exist = kept.gather(-1, order)
        keys = candidates.unsqueeze(-2).expand(kept.shape).gather(-1, order)
        yield part, keys, exist
        best = keys[..., -1, :][..., : min(count, part.stop)]


def lists_of(parts: Iterable[tuple[slice, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(offsets, tokens) for a `Layout`, from keys (batch, heads, places, n) and which exist.

    Memory goes by the keys that exist.
    """
    rows, tokens, counts = [], [], []
    for part, keys, exist in parts:
        batch, head, row, _ = exist.nonzero(as_tuple=True)
        rows.append((batch * exist.shape[1] + head, row + part.start))
        tokens.append(keys[exist])
        counts.append(exist.sum(-1))
    count = torch.cat(counts, dim=-1)
    lists = torch.cat([head * count.shape[-1] + row for head, row in rows])
    ends = count.flatten().cumsum(0).reshape(count.shape)
    offsets = torch.cat([ends[..., :1] - count[..., :1], ends], dim=-1)
    return offsets, torch.cat(tokens)[lists.argsort(stable=True)].to(torch.int32)
