"""S2-Attention: near key blocks, and far ones that the heads share out among themselves.

Every query attends a window of near blocks. Of the blocks before it, each head attends every
`stride`-th, and neighbouring heads are shifted against each other, so that all heads together miss
none. The pattern is fixed: it looks at no query and no key, and a model can be trained with it.

**Paper.** Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention
Heads, 2024. https://arxiv.org/abs/2407.17678

**Claim.** Up to 25.3 times faster attention than FlashAttention-2 and perfect retrieval at 32k
tokens. The claim was not tried here. Tests assert that the shards of all heads make the whole
causal map, and compare layouts with the rule pair by pair.

**Defaults.** Blocks of 64, 32 of them near, a stride of 8, as the release's example.

**Notes.** Stripes stand at absolute places: a block that has left the window and is on no stripe of
a head is never needed again, and `gs.attention_cache` drops it behind a prompt; what is generated
stays. Query heads that share keys
share a pattern. The shift between heads is stride / heads of keys, rounded down, and 1 at least.
All heads together miss no block where there are as many heads as the stride has blocks; with fewer
the layout is refused, unless dense heads or layers see the rest. Dense heads come last, and take
no part in sharing. `dense_every` makes every n-th layer dense, as Phi-3-small has every second. A
part of a prompt that begins inside a block sees up to a block more than the whole prompt would.
Use the method while training, for a model trained densely was not made for the gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall, CachedKeys
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_causal, check_count, from_blocks
from gossamer.ops.attention import Layout


@dataclass(frozen=True)
class S2Attention:
    """A window of near blocks, and each head's own stripes.

    Parameters
    ----------
    local : int
        Blocks of the window, the query's own included.
    stride : int
        Blocks from one stripe of a head to the next.
    block : int
        Tokens of a block.
    offset : int
        Blocks by which all stripes are shifted to the left.
    dense_heads : int
        Heads of keys, the last ones, that attend everything.
    dense_every : int
        Every so many layers one is dense; 0 for none.

    References
    ----------
    Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads
    (2024).
    """

    local: int = 32
    stride: int = 8
    block: int = 64
    offset: int = 0
    dense_heads: int = 0
    dense_every: int = 0

    last: ClassVar[int] = 0
    """The pattern looks at no query."""
    card: ClassVar[Card] = Card(
        name="s2attention",
        topic="attention",
        role="key_scorer",
        needs=(),
        patterns=("block",),
        year=2024,
        link="https://arxiv.org/abs/2407.17678",
        status="experimental",
    )

    def __post_init__(self) -> None:
        for name in ("local", "stride", "block"):
            check_count("S2Attention", name, getattr(self, name))
        for name in ("offset", "dense_heads", "dense_every"):
            check_count("S2Attention", name, getattr(self, name), 0)

    def layout(self, call: AttentionCall) -> Layout:
        """The window and the stripes of each head of keys."""
        check_causal("S2Attention", call)
        possible = call.possible_blocks(self.block, self.block)
        first = torch.arange(0, call.queries, self.block, device=possible.device) + call.past
        near = torch.arange(possible.shape[1], device=possible.device) > (
            (first // self.block).unsqueeze(1) - self.local
        )
        column = torch.arange(possible.shape[1], device=possible.device)
        stripes = self._stripes(column.expand(call.key.shape[1], -1), call.layer)
        return from_blocks(
            (possible & (near | stripes.unsqueeze(1))).unsqueeze(0), call, self.block
        )

    def kept_keys(self, cached: CachedKeys) -> Tensor:
        """bool (kv_heads, rows): the keys that queries behind this prompt may still attend."""
        column = cached.positions // self.block
        next_block, newest = cached.length // self.block, (cached.length - 1) // self.block
        near = column > min(next_block - self.local, newest - 1)  # no head is left without keys
        return cached.exists & (near | self._stripes(column, cached.layer))

    def _stripes(self, column: Tensor, layer: int) -> Tensor:
        """bool, the shape of `column` (kv_heads, n): blocks that a head attends from anywhere."""
        heads = column.shape[0]
        sharing = heads - self.dense_heads
        if self.dense_every and (layer + 1) % self.dense_every == 0:
            return torch.ones_like(column, dtype=torch.bool)
        step = self._step(sharing, heads)
        head = torch.arange(heads, device=column.device).unsqueeze(1)
        return (head >= sharing) | ((column + head * step + self.offset) % self.stride == 0)

    def _step(self, sharing: int, heads: int) -> int:
        """The shift between heads; raises UsageError where no head at all sees some blocks."""
        if sharing < 0:
            raise UsageError(
                f"S2Attention: {self.dense_heads} dense heads, and the model has {heads} of keys"
            )
        if sharing < self.stride and not self.dense_heads and not self.dense_every:
            raise UsageError(
                f"S2Attention: {heads} heads of keys see {heads} of every {self.stride} far "
                f"blocks, and no head the others; take a stride of {heads} at most, or dense heads "
                "or layers"
            )
        return max(1, self.stride // max(1, sharing))
