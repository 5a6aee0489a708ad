"""Block-Sparse: key blocks by the products of mean queries and mean keys.

Queries and keys are averaged over blocks. Each block of queries takes the key blocks with the
highest products of averages, and always its own block, the one before and the first.

**Paper.** The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs, 2025, which defines
it as one of its baselines. https://arxiv.org/abs/2504.17768

**Claim.** At long inputs the best sparse configurations of larger models lie on the Pareto front of
quality over cost. `attention_prefill.json` holds what this chooser keeps and costs on
SmolLM2-135M.

**Defaults.** Blocks of 16 tokens, 64 of them per block of queries, as in the study's configuration.
Blocks of 64 run faster.

**Notes.** Each query head chooses for itself. `density` sets the number of blocks from the length,
so that the computed pairs are at most that share of the causal ones. The blocks that are always
taken may need more; the measured density says so. Averages of the last block are over the tokens
it has. Attention to both sides takes the block behind as well. A query block chooses by its
average, so a later token of the same block can change which earlier keys a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import (
    check_count,
    check_share,
    from_blocks,
    pooled,
    products,
)
from gossamer.ops.attention import Layout
from gossamer.ops.select import keep


@dataclass(frozen=True)
class BlockSparse:
    """The key blocks whose mean has the highest product with the mean query.

    Parameters
    ----------
    blocks : int
        Key blocks per block of queries, those always taken included.
    block : int
        Tokens of a block.
    density : float or None
        Instead of `blocks`: the share of pairs that may be computed, in (0, 1].

    References
    ----------
    The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs (2025).
    """

    blocks: int = 64
    block: int = 16
    density: float | None = None

    card: ClassVar[Card] = Card(
        name="blocksparse",
        topic="attention",
        role="key_scorer",
        needs=(),
        patterns=("block",),
        year=2025,
        link="https://arxiv.org/abs/2504.17768",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_count("BlockSparse", "blocks", self.blocks)
        check_count("BlockSparse", "block", self.block)
        if self.density is not None:
            check_share("BlockSparse", "density", self.density)
            if self.blocks != 64:
                raise UsageError("BlockSparse: give blocks or density, not both")

    def layout(self, call: AttentionCall) -> Layout:
        """The chosen tiles of each head."""
        possible = call.possible_blocks(self.block, self.block)
        scores = self.score(call).masked_fill(~possible, -torch.inf)
        always = self._always(call, possible)
        count = self.blocks
        if self.density is not None:
            count = count_for(self.density, call.block_pairs(self.block, self.block), always)
        return from_blocks(keep(scores, TopK(count), always=always), call, self.block)

    def score(self, call: AttentionCall) -> Tensor:
        """The product of mean query and mean key, float32 (batch, heads, blocks, key blocks)."""
        return products(pooled(call.query, self.block), pooled(call.key, self.block))

    def _always(self, call: AttentionCall, possible: Tensor) -> Tensor:
        """The blocks at the queries' own positions, the one before, and the first."""
        queries, keys = possible.shape
        first = (torch.arange(queries) * self.block + call.past).unsqueeze(1)
        last = (first + self.block - 1).clamp(max=call.keys - 1)
        column = torch.arange(keys)
        own = (column >= first // self.block - 1) & (column <= last // self.block)
        if not call.causal:
            own |= column == last // self.block + 1
        return ((own | (column == 0)).to(possible.device)) & possible


def count_for(density: float, pairs: Tensor, always: Tensor) -> int:
    """The most blocks for each block of queries that compute at most this share of the pairs.

    pairs: (query blocks, key blocks), as `AttentionCall.block_pairs` counts them. The blocks of
    `always` come first. One at least.
    """
    order = (pairs + always * (int(pairs.max()) + 1)).argsort(dim=1, descending=True)
    costs = pairs.gather(1, order).sum(0).cumsum(0)
    return max(1, int((costs <= density * int(pairs.sum())).sum()))
