"""The best keys of every prefix: what a query may choose among when later tokens are unknown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.core.budget import TopK
from gossamer.ops.select import keep


class Part(NamedTuple):
    """Of some places the keys that may be kept, int64 (.., candidates), ascending, and which are,
    bool (.., places, candidates). The last candidates are the places themselves."""

    places: slice
    candidates: Tensor
    kept: Tensor


def running_top(scores: Tensor, count: int, rows: int = 64) -> Iterator[Part]:
    """Of each place, the `count` highest scores up to it, a block of places at a time.

    scores: (..., length), one for each key. Of equal scores the later key comes first. Nothing of
    size length * length is made.
    """
    length = scores.shape[-1]
    places = torch.arange(length, device=scores.device)
    best = places[:0].expand(*scores.shape[:-1], 0)
    for first in range(0, length, rows):
        part = slice(first, min(first + rows, length))
        own = places[part].expand(*scores.shape[:-1], -1)
        candidates = torch.cat([best, own], dim=-1)
        visible = candidates.unsqueeze(-2) <= places[part].unsqueeze(-1)
        known = scores.gather(-1, candidates).unsqueeze(-2).expand(visible.shape)
        known = known.masked_fill(~visible, -torch.inf)
        kept = keep(known.flip(-1), TopK(count)).flip(-1) & visible
        yield Part(part, candidates, kept)
        best = candidates[kept[..., -1, :]].unflatten(0, (*scores.shape[:-1], -1))


def lists_of(parts: Iterable[Part]) -> tuple[Tensor, Tensor]:
    """(offsets, tokens) for a `Layout`, from parts of (batch, heads, ...).

    Memory goes by the keys that are kept.
    """
    found, counts = [], []
    for part in parts:
        batch, head, row, column = part.kept.nonzero(as_tuple=True)
        count = part.kept.sum(-1)
        starts = count.flatten().cumsum(0) - count.flatten()
        nth = torch.arange(len(row), device=row.device) - starts.repeat_interleave(count.flatten())
        found.append(
            (batch, head, row + part.places.start, nth, part.candidates[batch, head, column])
        )
        counts.append(count)
    count = torch.cat(counts, dim=-1)
    ends = count.flatten().cumsum(0).reshape(count.shape)
    offsets = torch.cat([ends[..., :1] - count[..., :1], ends], dim=-1)
    tokens = torch.empty(int(count.sum()), dtype=torch.int32, device=count.device)
    for batch, head, row, nth, keys in found:
        tokens[offsets[batch, head, row] + nth] = keys.to(torch.int32)
    return offsets, tokens
