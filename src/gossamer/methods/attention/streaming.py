"""StreamingLLM: the first keys and a window of the last ones.

Every query attends the first few keys, on which models park attention that has nowhere to go, and
the keys of a window that ends at itself.

**Paper.** Efficient Streaming Language Models with Attention Sinks, 2023.
https://arxiv.org/abs/2309.17453

**Claim.** With 4 first keys kept, models with windowed attention stay stable over millions of
tokens. `attention_prefill.json` holds what this chooser keeps and costs on SmolLM2-135M.

**Defaults.** 4 sinks, as in the paper; a window of 1024, a choice of this library.

**Notes.** The pattern serves prompts, by `gossamer.sparse_attention`, and caches, by
`gossamer.attention_cache`. It looks at no query and no key, so a later token never changes what an
earlier one sees. A cache gives up one key for each new token once it holds `sinks` and `window`, and
its memory stays. Positions are those of the text in both; the paper numbers the kept keys anew in
its cache. Keys come rotated, and a prompt that was attended densely or sparsely meets the same
distances in the cache. So a text is no longer than the model's positions. All heads share one
layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall, CachedKeys
from gossamer.core.card import Card
from gossamer.methods.attention.evicting import fixed
from gossamer.methods.attention.tiles import check_causal, check_count
from gossamer.ops.attention import Layout, bits


@dataclass(frozen=True)
class StreamingLLM:
    """The first keys and a window of the last ones.

    Parameters
    ----------
    window : int
        Keys of the window, the query's own included.
    sinks : int
        First keys that every query attends.
    block : int
        Tokens of a tile.

    References
    ----------
    Efficient Streaming Language Models with Attention Sinks (2023).
    """

    window: int = 1024
    sinks: int = 4
    block: int = 64

    card: ClassVar[Card] = Card(
        name="streamingllm",
        topic="attention",
        role="key_scorer",
        needs=(),
        patterns=("unstructured",),
        year=2023,
        link="https://arxiv.org/abs/2309.17453",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_count("StreamingLLM", "window", self.window)
        check_count("StreamingLLM", "sinks", self.sinks, 0)
        check_count("StreamingLLM", "block", self.block)

    last: ClassVar[int] = 0

    def kept_keys(self, cached: CachedKeys) -> Tensor:
        """bool (kv_heads, rows): the first keys and those of the window."""
        return fixed(cached, self.sinks, self.window)

    def rolls(self) -> bool:
        """Each new token pushes the oldest key out of a full window."""
        return True

    def layout(self, call: AttentionCall) -> Layout:
        """One layout for all heads; tiles at the edges of the window have masks."""
        check_causal("StreamingLLM", call)
        size, device = self.block, call.query.device
        first = (torch.arange(0, call.queries, size, device=device) + call.past).unsqueeze(1)
        last = (first + size - 1).clamp(max=call.keys - 1)
        edge = torch.arange(0, call.keys, size, device=device)
        end = (edge + size - 1).clamp(max=call.keys - 1)
        possible = call.possible_blocks(size, size)
        whole = (end < self.sinks) | (edge > last - self.window)
        some = (edge < self.sinks) | (end > first - self.window)
        found = Layout.from_blocks(some & possible, call.queries, call.keys, size, size)
        partial = (some & possible & ~whole)[some & possible]
        row, column = (some & possible).nonzero()[partial].unbind(1)
        query = first[row] + torch.arange(size, device=device)
        key = edge[column].unsqueeze(1) + torch.arange(size, device=device)
        inside = key.unsqueeze(1) > query.unsqueeze(2) - self.window
        masks = bits.pack(inside | (key < self.sinks).unsqueeze(1))
        tiles = torch.where(partial, partial.cumsum(0) - 1, -1).to(torch.int32)
        return Layout(
            call.queries, call.keys, found.offsets, found.blocks, size, size, tiles, masks
        )
