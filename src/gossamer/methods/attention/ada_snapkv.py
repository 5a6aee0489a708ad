"""Ada-SnapKV: SnapKV with more keys for the heads that need them.

Once a prompt is over, each head of keys gets a floor of its own best keys. What is left of the
layer's budget goes to the best keys of any head.

**Paper.** Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
Inference, 2024. https://arxiv.org/abs/2407.11550

**Claim.** At the same memory, better quality than equal budgets for all heads.

**Defaults.** 1024 keys a head on average, at least a fifth of them for each; the first 4 and the
last 128 fixed; the last 256 queries; averages over 21 neighbours. These are the figures of The
Sparse Frontier (2025).

**Notes.** A key counts by the largest attention that any of the last queries of any query head of
its group gives it, where SnapKV takes means and sums. Only the layer's sum over heads is bounded:
one head may hold far more than the average. Everything else is as in SnapKV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import CachedKeys
from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.methods.attention.budgets import budget_of
from gossamer.methods.attention.evicting import fixed, last_attention, smoothed
from gossamer.methods.attention.snapkv import check_evictor
from gossamer.methods.attention.tiles import check_share
from gossamer.ops.select import keep


@dataclass(frozen=True)
class AdaSnapKV:
    """The keys that the last queries attend most, with one budget for all heads of a layer.

    Parameters
    ----------
    tokens : int
        Keys of a head on average, the fixed ones included.
    density : float or None
        Instead of `tokens`: their share of the prompt, in (0, 1].
    floor : float
        The share of the average that each head gets, in (0, 1].
    last : int
        Queries at the end of the prompt whose attention is looked at.
    sinks, window : int
        The first and the last keys, which are always kept.
    kernel : int
        Neighbours over which attention is averaged; odd.

    References
    ----------
    Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference
    (2024).
    """

    tokens: int = 1024
    density: float | None = None
    floor: float = 0.2
    last: int = 256
    sinks: int = 4
    window: int = 128
    kernel: int = 21

    card: ClassVar[Card] = Card(
        name="adasnapkv",
        topic="attention",
        role="cache",
        needs=(),
        patterns=("unstructured",),
        year=2024,
        link="https://arxiv.org/abs/2407.11550",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_evictor("AdaSnapKV", self)
        check_share("AdaSnapKV", "floor", self.floor)

    def kept_keys(self, cached: CachedKeys) -> Tensor:
        """bool (kv_heads, rows)."""
        least = self.sinks + self.window
        budget = budget_of(self.tokens, self.density, cached.length, least)
        floor = min(budget, max(int(self.floor * budget), least))
        scores = self.score(cached)
        own = keep(scores, TopK(floor), fixed(cached, self.sinks, self.window))
        count = own.shape[0] * (budget - floor)
        rest = scores.masked_fill(own, -torch.inf)
        return own | keep(rest.flatten(), TopK(count)).reshape(own.shape)

    def score(self, cached: CachedKeys) -> Tensor:
        """The smoothed largest attention of each key, float32 (kv_heads, rows); -inf where none
        is."""
        most = last_attention(cached, "max").unflatten(0, (-1, cached.shared)).amax(1)
        return smoothed(most, self.kernel).masked_fill(~cached.exists, -torch.inf)
