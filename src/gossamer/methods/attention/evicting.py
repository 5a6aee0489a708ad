"""Scores of cached keys from the end of a prompt, and keys that always stay."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gossamer.core.attention import CachedKeys


def last_attention(cached: CachedKeys, over: Literal["sum", "max"]) -> Tensor:
    """The attention of the last queries to each key, summed or the largest; float32 (heads, rows).

    One head at a time, so that queries * rows is the memory.
    """
    heads, queries, _ = cached.query.shape
    found = cached.query.new_zeros(heads, cached.key.shape[1], dtype=torch.float32)
    if not queries:
        return found
    device = cached.query.device
    place = torch.arange(cached.length - queries, cached.length, device=device).unsqueeze(1)
    for head in range(heads):
        group = head // cached.shared
        logits = (cached.query[head].float() * cached.scale) @ cached.key[group].float().T
        there = cached.positions[group]
        weights = torch.softmax(logits.masked_fill((there < 0) | (there > place), -torch.inf), -1)
        found[head] = weights.sum(0) if over == "sum" else weights.amax(0)
    return found


def smoothed(scores: Tensor, kernel: int) -> Tensor:
    """Averages over `kernel` neighbours (.., rows), with 0 beyond the ends."""
    flat = scores.reshape(1, -1, scores.shape[-1])
    return torch.nn.functional.avg_pool1d(flat, kernel, 1, kernel // 2).reshape(scores.shape)


def fixed(cached: CachedKeys, sinks: int, window: int) -> Tensor:
    """bool (kv_heads, rows): the first keys of the text and the last."""
    place = cached.positions
    return cached.exists & ((place < sinks) | (place >= cached.length - window))
