"""Graph-KV: segments of a prompt that attend each other along a graph, not in the order they stand.

A prompt holds source segments, then targets, then a question. A source attends itself alone. A
target attends the start, its own sources and itself. The question attends everything. All sources
stand at the same positions, and so do all targets, so that no segment comes before another.

**Paper.** Graph-KV: Breaking Sequence via Injecting Structural Biases into Large Language Models,
2025. https://arxiv.org/abs/2506.07334

**Claim.** The abstract gives no figure. It says that Graph-KV does better than sequential encoding
on seven sets of retrieval-augmented questions, on questions about papers and on citation topics.
The claim was not tried here. Tests compare a prompt in one piece with one put together from cached
segments.

**Defaults.** The paper's models are Llama-3.1-8B-type ones, tuned for attention to blocks.

**Notes.** `positions(length)` goes into the model as `position_ids`, with an attention mask of ones.
Where every segment is both, as in the paper's variant for retrieval, it stands in the prompt
twice, first as source and then as target; `edges` may name only some sources for all targets. Who
sees whom is decided by segment and never by position, as positions repeat. Sources are encoded
without the start, so that their keys can be kept and used again: `gs.encode_segment` takes
positions out of them in float32, and `gs.join_segments` puts others in, from the kept ones each
time, so that nothing drifts. The largest
segment sets where the next kind begins. A model that was not tuned for such attention does worse
with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_causal, check_count
from gossamer.ops.attention import Layout


@dataclass(frozen=True)
class GraphKV:
    """Segments of a prompt, and which of them a segment attends.

    Parameters
    ----------
    prefix : int
        Tokens at the start, before all segments.
    sources : tuple of int
        Tokens of each source segment, in the prompt's order.
    targets : tuple of int
        Tokens of each target segment, which stand behind all sources.
    edges : tuple of (int, int) or None
        Pairs of a source's and a target's number; every source for every target where None.

    References
    ----------
    Graph-KV: Breaking Sequence via Injecting Structural Biases into Large Language Models (2025).
    """

    prefix: int = 0
    sources: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    edges: tuple[tuple[int, int], ...] | None = None

    card: ClassVar[Card] = Card(
        name="graphkv",
        topic="attention",
        role="key_scorer",
        needs=(),
        patterns=("unstructured",),
        year=2025,
        link="https://arxiv.org/abs/2506.07334",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_count("GraphKV", "prefix", self.prefix, 0)
        for name in ("sources", "targets"):
            lengths = getattr(self, name)
            if not isinstance(lengths, tuple | list):
                raise UsageError(f"GraphKV: {name} are the lengths of segments, not {lengths!r}")
            for length in lengths:
                check_count("GraphKV", f"each of {name}", length)
        for edge in self.edges or ():
            counts = (len(self.sources), len(self.targets))
            if (
                not isinstance(edge, tuple | list)
                or len(edge) != 2
                or not all(
                    isinstance(end, int) and 0 <= end < count
                    for end, count in zip(edge, counts, strict=True)
                )
            ):
                raise UsageError(
                    f"GraphKV: edge {edge!r} is no pair of one of {counts[0]} sources and one of "
                    f"{counts[1]} targets, whose numbers begin at 0"
                )

    @property
    def segmented(self) -> int:
        """Tokens before the question."""
        return self.prefix + sum(self.sources) + sum(self.targets)

    @property
    def question(self) -> int:
        """The position at which the question begins."""
        return self.prefix + max(self.sources, default=0) + max(self.targets, default=0)

    def positions(self, length: int) -> Tensor:
        """int64 (length,): the position of every token of a prompt, the question's included."""
        first = self.prefix + max(self.sources, default=0)
        parts = [torch.arange(self.prefix)]
        parts += [self.prefix + torch.arange(size) for size in self.sources]
        parts += [first + torch.arange(size) for size in self.targets]
        parts.append(self.question + torch.arange(max(0, length - self.segmented)))
        return torch.cat(parts)[:length]

    def sources_of(self, target: int) -> list[int]:
        """The numbers of the sources that a target attends."""
        if self.edges is None:
            return list(range(len(self.sources)))
        return sorted({source for source, other in self.edges if other == target})

    def layout(self, call: AttentionCall) -> Layout:
        """The tiles that hold a pair, those at the edges of segments with masks."""
        check_causal("GraphKV", call)
        number = self.segments(call.keys).to(call.key.device)
        sees = self.sees().to(number.device)
        rows = [
            Layout.from_mask(self._rows(call, number, sees, first))
            for first in range(0, call.queries, 64)
        ]
        return _stacked(rows, call)

    def segments(self, length: int) -> Tensor:
        """int64 (length,): each token's segment; the prefix is 0 and the question the last."""
        sizes = [self.prefix, *self.sources, *self.targets, max(0, length - self.segmented)]
        return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:length]

    def sees(self) -> Tensor:
        """bool (segments, segments): whether the first attends the second."""
        count = 2 + len(self.sources) + len(self.targets)
        found = torch.eye(count, dtype=torch.bool)
        found[-1] = True
        for target in range(len(self.targets)):
            row = found[1 + len(self.sources) + target]
            row[0] = True
            row[[1 + source for source in self.sources_of(target)]] = True
        return found

    def _rows(self, call: AttentionCall, number: Tensor, sees: Tensor, first: int) -> Tensor:
        """bool (queries of a block, keys)."""
        place = torch.arange(first, min(first + 64, call.queries), device=number.device) + call.past
        earlier = torch.arange(call.keys, device=number.device) <= place.unsqueeze(1)
        return sees[number[place]][:, number] & earlier


def _stacked(rows: list[Layout], call: AttentionCall) -> Layout:
    """One layout from those of its blocks of queries."""
    counts = torch.cat([row.offsets.diff(dim=-1) for row in rows], dim=-1)
    tiles: list[Tensor] = []
    masks: list[Tensor] = []
    for row in rows:
        assert row.tiles is not None and row.masks is not None
        before = sum(len(part) for part in masks)
        tiles.append(torch.where(row.tiles >= 0, row.tiles + before, row.tiles))
        masks.append(row.masks)
    offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    parts: dict[str, Any] = {"tiles": torch.cat(tiles), "masks": torch.cat(masks)}
    blocks = torch.cat([row.blocks for row in rows])
    return Layout(call.queries, call.keys, offsets, blocks, **parts)
