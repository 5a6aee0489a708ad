"""One call of attention as plain data: what a method looks at before it chooses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Queries, keys and values of one layer, as the executor takes them.

    The queries are the last of the keys: query i stands at position `past + i`. Padding was taken
    away before, so that blocks begin at the first token of each text.

    Attributes
    ----------
    query : Tensor
        (batch, heads, queries, width), with positions rotated into it where the model does so.
    key, value : Tensor
        (batch, kv_heads, keys, width); neighbouring query heads share one of theirs.
    scale : float
        Factor of the products.
    causal : bool
        Whether a query sees no key behind its own position.
    layer, layers : int
        The layer's number, from 0, and how many the model has.
    rotation : Tensor or None
        Radians a position of each pair of entries, (up to width / 2,), where the model rotates
        positions into queries and keys in halves; None otherwise.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool
    layer: int = 0
    layers: int = 1
    rotation: Tensor | None = None

    @property
    def queries(self) -> int:
        """How many queries each head has."""
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        """How many keys each head has."""
        return self.key.shape[2]

    @property
    def past(self) -> int:
        """Keys before the first query."""
        return self.keys - self.queries

    @property
    def shared(self) -> int:
        """How many query heads share a head of keys."""
        return self.query.shape[1] // self.key.shape[1]

    def possible_blocks(self, rows: int, columns: int) -> Tensor:
        """bool (query blocks, key blocks): where at least one pair may be attended."""
        device = self.query.device
        first = torch.arange(0, self.keys, columns, device=device)
        last = torch.arange(0, self.queries, rows, device=device) + rows - 1
        last = last.clamp(max=self.queries - 1) + self.past
        if not self.causal:
            last = torch.full_like(last, self.keys - 1)
        return first <= last.unsqueeze(1)

    def block_pairs(self, rows: int, columns: int) -> Tensor:
        """int64 (query blocks, key blocks): how many pairs of each tile may be attended."""
        device = self.query.device
        first = torch.arange(0, self.queries, rows, device=device).unsqueeze(1)
        edge = torch.arange(0, self.keys, columns, device=device)
        height = (self.queries - first).clamp(max=rows)
        width = (self.keys - edge).clamp(max=columns)
        if not self.causal:
            return height * width
        return causal_pairs(first + self.past, height, edge, width)


@dataclass(frozen=True, eq=False)
class CachedKeys:
    """One text's keys in the cache of one layer, as a method sees them that evicts.

    Heads may hold different keys, for an earlier prompt may have been evicted from already.

    Attributes
    ----------
    query : Tensor
        (heads, queries, width): the last queries of the prompt, as many as the method's `last`, or
        fewer. Query i stands at position `length - queries + i`.
    key, value : Tensor
        (kv_heads, rows, width), in the order of the text.
    positions : Tensor
        int64 (kv_heads, rows): the keys' places in the text; -1 behind the last key of a head.
    length : int
        Tokens of the text.
    scale : float
        Factor of the products.
    layer, layers : int
        The layer's number, from 0, and how many the model has.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    length: int
    scale: float
    layer: int = 0
    layers: int = 1

    @property
    def exists(self) -> Tensor:
        """bool (kv_heads, rows): where there is a key."""
        return self.positions >= 0

    @property
    def shared(self) -> int:
        """How many query heads share a head of keys."""
        return self.query.shape[0] // self.key.shape[0]


def causal_pairs(position: Tensor, queries: Tensor, key: Tensor, keys: Tensor) -> Tensor:
    """How many pairs of so many queries, from a position on, and keys, from another, are causal.

    That is where the query's position is at least the key's; in closed form, elementwise, int64.
    """

    def before(end: Tensor) -> Tensor:
        rising = end.clamp(min=0).minimum(keys)
        return rising * (rising + 1) // 2 + (end.clamp(min=0) - rising) * keys

    return before(position - key + queries) - before(position - key)
