"""AnchorAttention: single keys whose logits come near those at the start and in the window.

The first block and a window of near keys are attended. The mean of the queries' highest logits
there is the anchor of a block of queries. A key in between is taken by a whole group of blocks
where a block's mean query reaches the anchor less `theta`. Nothing is sorted.

**Paper.** AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity, 2025.
https://arxiv.org/abs/2505.23520

**Claim.** 1.44 times faster than the best before at 128k tokens, with higher recall.
`attention_prefill.json` holds what this chooser keeps and costs on SmolLM2-135M.

**Defaults.** Blocks of 128, groups of 16 blocks, theta 12 nats, as the release's entry point.

**Notes.** The window begins one block before the group, as in the paper; the release's shipped
entry point begins it at the group. The anchor and `theta` are in nats. One of the release's kernels
compares base-2 logits, where 12 stands for 8.3 nats. The paper goes on from the first pass's
softmax; ours computes its highest logits apart and then all pairs in one softmax. The output is the
same, and the logits of the first pass are computed twice. Leftover queries
at the end are a shorter block of their group, where the release attends them densely. Each query head chooses for itself, and a group by the means of
its blocks, so a later token of the group can change which earlier keys a query sees. Theta is an
absolute difference: where logits vary little, 12 keeps everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import (
    check_causal,
    check_count,
    from_blocks,
    pooled,
    products,
    with_lists,
)
from gossamer.ops.attention import Layout


@dataclass(frozen=True)
class AnchorAttention:
    """The keys whose logits lie at most `theta` below the anchor.

    Parameters
    ----------
    theta : float
        How far below the anchor a logit may lie, in nats. Higher keeps more.
    step : int
        Blocks of queries that share their keys.
    block : int
        Tokens of a block.

    References
    ----------
    AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity (2025).
    """

    theta: float = 12.0
    step: int = 16
    block: int = 128

    card: ClassVar[Card] = Card(
        name="anchorattention",
        topic="attention",
        role="key_scorer",
        needs=(),
        patterns=("unstructured", "block"),
        year=2025,
        link="https://arxiv.org/abs/2505.23520",
        status="experimental",
    )

    def __post_init__(self) -> None:
        number = isinstance(self.theta, int | float) and not isinstance(self.theta, bool)
        if not number or not torch.isfinite(torch.tensor(float(self.theta))):
            raise UsageError(f"AnchorAttention: theta is a finite number, not {self.theta!r}")
        check_count("AnchorAttention", "step", self.step)
        check_count("AnchorAttention", "block", self.block)

    def layout(self, call: AttentionCall) -> Layout:
        """The first block, the window, and the chosen keys of each group."""
        check_causal("AnchorAttention", call)
        batch, heads = call.query.shape[:2]
        blocks = self._window(call).expand(batch, heads, -1, -1)
        tiles = from_blocks(blocks, call, self.block)
        return with_lists(tiles, self.choose(call), self.block * self.step)

    def choose(self, call: AttentionCall) -> Tensor:
        """bool (batch, heads, groups, keys): the keys between the first block and the window."""
        anchors = pooled(self.anchors(call).unsqueeze(-1), self.block).squeeze(-1)
        means = pooled(call.query, self.block)
        batch, heads, blocks = anchors.shape
        found = torch.zeros(
            batch, heads, -(-blocks // self.step), call.keys, dtype=torch.bool,
            device=call.query.device,
        )  # fmt: skip
        for group in range(found.shape[2]):
            inside = slice(group * self.step, (group + 1) * self.step)
            keys = slice(self.block, max(self.block, self._begin(call, group)))
            logits = products(means[:, :, inside], call.key[:, :, keys].float()) * call.scale
            bar = anchors[:, :, inside].unsqueeze(-1) - self.theta
            found[:, :, group, keys] = (logits >= bar).any(2)
        return found

    def anchors(self, call: AttentionCall) -> Tensor:
        """float32 (batch, heads, queries): each query's highest logit in the window.

        The exact row maximum of the first pass, one block of queries at a time.
        """
        found = []
        key = call.key.float()
        for row, first in enumerate(range(0, call.queries, self.block)):
            last = min(first + self.block, call.queries)
            begin, end = self._begin(call, row // self.step), last + call.past
            query = call.query[:, :, first:last].float() * call.scale
            hidden = torch.ones(last - first, last - first, dtype=torch.bool, device=key.device)
            near = products(query, key[:, :, begin:end])
            near[..., first - last :].masked_fill_(hidden.triu(1), -torch.inf)
            highest = near.amax(-1)
            if begin:
                highest = highest.maximum(products(query, key[:, :, : self.block]).amax(-1))
            found.append(highest)
        return torch.cat(found, dim=2)

    def _begin(self, call: AttentionCall, group: int) -> int:
        """The first key of a group's window: one block before its first query's."""
        own = (group * self.step * self.block + call.past) // self.block
        return max(0, own - 1) * self.block

    def _window(self, call: AttentionCall) -> Tensor:
        """bool (query blocks, key blocks): the first block and the window up to the diagonal."""
        possible = call.possible_blocks(self.block, self.block)
        begins = [
            self._begin(call, row // self.step) // self.block for row in range(possible.shape[0])
        ]
        begin = torch.tensor(begins, device=possible.device).unsqueeze(1)
        column = torch.arange(possible.shape[1], device=possible.device)
        return possible & ((column == 0) | (column >= begin))
