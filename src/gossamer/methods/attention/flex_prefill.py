"""FlexPrefill: as many columns and diagonals as reach a share of attention.

Like Vertical-Slash, but each head keeps as many keys, and as many offsets, as reach a share of the
attention of the last queries. A head with wide attention thus keeps more than one with narrow.

**Paper.** FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence
Inference, 2025. https://arxiv.org/abs/2502.20766

**Claim.** Better accuracy at the same speed than fixed patterns on long-context tasks.
`attention_prefill.json` holds what this chooser keeps and costs on SmolLM2-135M.

**Defaults.** The last 512 queries; a share of 0.65; at least 512 keys and offsets; the first 4 keys
and the nearest 64 offsets are fixed; tiles of 64. These are the figures of The Sparse Frontier
(2025).

**Notes.** This is the form of The Sparse Frontier. The paper also switches each head between this
pattern and a query-aware block pattern, by the square root of a Jensen-Shannon divergence below
0.1; as in that study, the switch is left out. The count is the entries whose cumulated share is at
most `share`, and one more. The fixed entries are put first after the count is known, so they take
places from others. Each query head chooses for itself, from the end of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.methods.attention.last_queries import columns_and_offsets, columns_and_slashes
from gossamer.methods.attention.tiles import check_causal, check_count, check_share
from gossamer.ops.attention import Layout
from gossamer.ops.select import keep


@dataclass(frozen=True)
class FlexPrefill:
    """As many keys and offsets of each head as reach a share of the last queries' attention.

    Parameters
    ----------
    share : float
        The attention to be reached, in (0, 1].
    least : int
        Keys, and offsets, that are kept at least.
    last : int
        Queries at the end of the prompt whose attention is looked at.
    sinks, near : int
        The first keys and the nearest offsets, which are always kept.
    block : int
        Tokens of a tile.

    References
    ----------
    FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference
    (2025).
    """

    share: float = 0.65
    least: int = 512
    last: int = 512
    sinks: int = 4
    near: int = 64
    block: int = 64

    card: ClassVar[Card] = Card(
        name="flexprefill",
        topic="attention",
        role="key_scorer",
        needs=(),
        patterns=("unstructured", "block"),
        year=2025,
        link="https://arxiv.org/abs/2502.20766",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_share("FlexPrefill", "share", self.share)
        for name in ("least", "last", "near", "block"):
            check_count("FlexPrefill", name, getattr(self, name))
        check_count("FlexPrefill", "sinks", self.sinks, 0)

    def layout(self, call: AttentionCall) -> Layout:
        """Tiles along the kept offsets, and the kept columns outside of them."""
        check_causal("FlexPrefill", call)
        columns, offsets = self.score(call)
        place = torch.arange(call.keys, device=columns.device)
        kept = self._keep(columns, place < self.sinks)
        near = self._keep(offsets, place < self.near)
        return columns_and_slashes(call, kept, near, self.block)

    def score(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """The mean attention of the last queries by key and by offset, (batch, heads, keys)."""
        columns, offsets = columns_and_offsets(call, self.last)
        count = min(self.last, call.queries)
        return columns / count, offsets / count

    def _keep(self, scores: Tensor, always: Tensor) -> Tensor:
        """The counts differ by head, so each is its own selection."""
        shares = scores.sort(dim=-1, descending=True).values.cumsum(-1)
        counts = ((shares <= self.share).sum(-1) + 1).clamp(min=self.least)
        rows = scores.flatten(0, -2)
        kept = [
            keep(row, TopK(count), always)
            for row, count in zip(rows, counts.flatten().tolist(), strict=True)
        ]
        return torch.stack(kept).reshape(scores.shape)
