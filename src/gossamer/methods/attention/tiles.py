"""Blocks, bands and lists of keys, which several methods choose from."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.errors import UsageError
from gossamer.ops.attention import Layout


def check_count(method: str, name: str, value: object, least: int = 1) -> None:
    """Raise UsageError unless it is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{method}: {name} is a whole number from {least}, not {value!r}")


def check_share(method: str, name: str, value: object) -> None:
    """Raise UsageError unless it is a fraction in (0, 1]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < float(value) <= 1:  # type: ignore[arg-type]
        raise UsageError(f"{method}: {name} is a fraction in (0, 1], not {value!r}")


def check_causal(method: str, call: AttentionCall) -> None:
    """Raise UsageError for attention to both sides."""
    if not call.causal:
        raise UsageError(
            f"{method} is made for causal attention, and layer {call.layer} attends to both "
            "sides: take blocksparse for encoders"
        )


def pooled(x: Tensor, block: int) -> Tensor:
    """The mean of each block of tokens, float32 (batch, heads, blocks, width).

    The last block's mean is over the tokens that it has.
    """
    length = x.shape[2]
    whole = length // block * block
    parts = [x[:, :, :whole].float().unflatten(2, (-1, block)).mean(3)] if whole else []
    if whole < length:
        parts.append(x[:, :, whole:].float().mean(2, keepdim=True))
    return torch.cat(parts, dim=2)


def products(query: Tensor, key: Tensor) -> Tensor:
    """query . key (batch, heads, queries, keys); neighbouring query heads share one of key's."""
    length, shared = query.shape[2], query.shape[1] // key.shape[1]
    stacked = query.unflatten(1, (-1, shared)).flatten(2, 3)  # one product for each head of keys
    return (stacked @ key.transpose(-1, -2)).unflatten(2, (shared, length)).flatten(1, 2)


def from_blocks(mask: Tensor, call: AttentionCall, rows: int, columns: int | None = None) -> Layout:
    """The layout of whole tiles."""
    return Layout.from_blocks(mask, call.queries, call.keys, rows, columns or rows)


def with_lists(layout: Layout, kept: Tensor, group: int) -> Layout:
    """The same tiles and, for each group of queries, those of its kept keys that no tile has.

    kept: bool (batch, heads, groups, keys), without keys behind a group's last query.
    """
    return _with_tokens(layout, kept.sum(-1), kept.nonzero()[:, -1], group)


def with_columns(layout: Layout, kept: Tensor, call: AttentionCall, group: int) -> Layout:
    """The same tiles, and for all queries those kept keys that no tile has.

    kept: bool (batch, heads, keys). Nothing of size groups * keys is made.
    """
    count = kept.sum(-1, keepdim=True)
    places = torch.argsort(~kept, dim=-1, stable=True)[..., : int(count.max())]  # ascending
    exists = torch.arange(places.shape[-1], device=kept.device) < count
    first = torch.arange(0, call.queries, group, device=kept.device)
    last = (first + group).clamp(max=call.queries) - 1 + call.past
    listed = exists.unsqueeze(2) & (places.unsqueeze(2) <= last.unsqueeze(1))
    tokens = places.unsqueeze(2).expand(listed.shape)[listed]
    return _with_tokens(layout, listed.sum(-1), tokens, group)


def _with_tokens(layout: Layout, counts: Tensor, tokens: Tensor, group: int) -> Layout:
    ends = counts.flatten().cumsum(0).reshape(counts.shape)
    offsets = torch.cat([ends[..., :1] - counts[..., :1], ends], dim=-1)
    return layout.with_tokens(offsets, tokens.to(torch.int32), group)
