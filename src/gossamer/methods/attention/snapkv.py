"""SnapKV: the cache keeps the keys that the end of the prompt attends most.

Once a prompt is over, the attention of its last queries is summed over each earlier key and
smoothed over neighbours. Each head of keys keeps those with the most, the first keys and the last.

**Paper.** SnapKV: LLM Knows What You are Looking for Before Generation, 2024.
https://arxiv.org/abs/2404.14469

**Claim.** At 16k tokens 3.6 times faster decoding and 8.2 times less memory, with quality
comparable to dense.

**Defaults.** 1024 keys, of which the first 4 and the last 128 are fixed; the last 256 queries;
averages over 21 neighbours. These are the figures of The Sparse Frontier (2025).

**Notes.** Heads of keys choose apart: query heads that share one are averaged, and queries summed.
Softmax and sums are float32. Averages at the ends count 0 beyond them. `tokens` holds for each
layer and head, and the fixed keys are within it; `density` is that share of the prompt, and never
less than the fixed keys. Tokens behind the prompt are kept. A further prompt is judged anew,
together with what was kept, when its first token comes; until then nothing is given up, so that a
prompt in chunks leaves the same cache as a whole one. Keys keep their rotation, and new tokens the
positions of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import CachedKeys
from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.budgets import budget_of, check_budget
from gossamer.methods.attention.evicting import fixed, last_attention, smoothed
from gossamer.methods.attention.tiles import check_count
from gossamer.ops.select import keep


@dataclass(frozen=True)
class SnapKV:
    """The keys that the last queries of a prompt attend most.

    Parameters
    ----------
    tokens : int
        Keys of each head, the fixed ones included.
    density : float or None
        Instead of `tokens`: their share of the prompt, in (0, 1].
    last : int
        Queries at the end of the prompt whose attention is looked at.
    sinks, window : int
        The first and the last keys, which are always kept.
    kernel : int
        Neighbours over which attention is averaged; odd.

    References
    ----------
    SnapKV: LLM Knows What You are Looking for Before Generation (2024).
    """

    tokens: int = 1024
    density: float | None = None
    last: int = 256
    sinks: int = 4
    window: int = 128
    kernel: int = 21

    card: ClassVar[Card] = Card(
        name="snapkv",
        topic="attention",
        role="cache",
        needs=(),
        patterns=("unstructured",),
        year=2024,
        link="https://arxiv.org/abs/2404.14469",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_evictor("SnapKV", self)

    def kept_keys(self, cached: CachedKeys) -> Tensor:
        """bool (kv_heads, rows)."""
        budget = budget_of(self.tokens, self.density, cached.length, self.sinks + self.window)
        always = fixed(cached, self.sinks, self.window)
        return keep(self.score(cached), TopK(budget), always)

    def score(self, cached: CachedKeys) -> Tensor:
        """The smoothed attention of each key, float32 (kv_heads, rows); -inf where none is."""
        sums = last_attention(cached, "sum").unflatten(0, (-1, cached.shared)).mean(1)
        return smoothed(sums, self.kernel).masked_fill(~cached.exists, -torch.inf)


def check_evictor(name: str, method: Any) -> None:
    """Raise UsageError for options that fit no text."""
    for option in ("last", "window", "kernel"):
        check_count(name, option, getattr(method, option))
    check_count(name, "sinks", method.sinks, 0)
    if not method.kernel % 2:
        raise UsageError(f"{name}: kernel is odd, not {method.kernel}")
    least = method.sinks + method.window
    what = "the first and last keys that are always kept; lower sinks or window"
    check_budget(name, method.tokens, method.density, least, what)
