"""PSA: key blocks at several resolutions, from whole keys down to means of eight.

Blocks of keys are ranked for each block of queries by an estimate of their attention. The first are
attended whole, the next over means of 2, 4 and 8 neighbours, and the rest are skipped. A mean stands
for so many keys, so the logarithm of their number is added to its logit.

**Paper.** PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation, 2025.
https://arxiv.org/abs/2512.04025

**Claim.** At 85% sparsity, 4-step CogVideoX-5B scores 0.826 in VBench, and 0.819 with 50 dense
steps.

**Defaults.** Blocks of 128 queries and 64 keys, quotas of 10, 5, 0 and 20% as the release's defaults
for CogVideoX; dense for the first quarter of the steps. `by="mass"` with shares of 0.4, 0.5, 0.6 and
0.8 is the setting for Wan 2.1.

**Notes.** Levels are those of the release, bit for bit on its recorded scores: intervals are rounded
to whole tiles, and by mass the finest level covers int(0.06 blocks) + 1 blocks at least. By quota it
covers one at least. The estimate samples every fourth token of each block, where the release draws
them at random, and takes the maximum of the softmax over samples. Tokens follow a Hilbert curve
through the video, so that means are over near places. The last group of keys may be smaller; its
logit is raised by the logarithm of its own number, where the release repeats the last token. Text is
never pooled. Density counts a mean as one key. The cap by similarity takes the coarsest level whose
own threshold is passed, as the release does, and never unskips a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.core.attention import AttentionCall
from gossamer.core.card import Card
from gossamer.core.denoising import Attended, DenoisingStep
from gossamer.core.errors import UsageError
from gossamer.methods.attention.orders import reordered, restored, space_filling
from gossamer.methods.attention.steps import (
    answer_dense,
    blocks_with,
    check_number,
    count_pairs,
    lists_of,
    sampled_mass,
    sizes,
)
from gossamer.methods.attention.tiles import check_count, pooled
from gossamer.ops.attention import Layout, State, attention, merge

LEVELS = (1, 2, 4, 8)
SAMPLED = 4


@dataclass(frozen=True)
class PSA:
    """Key blocks at the resolution that their estimated attention deserves.

    Parameters
    ----------
    by : str
        `quota`: shares of the blocks; `mass`: shares of the estimated attention.
    shares : tuple of float
        Where the levels 1, 2, 4 and 8 end, each from the one before to 1.
    rows, block : int
        Queries and keys of a block, multiples of 8.
    tile : int
        Keys of a tile at which intervals are rounded; at most `block`.
    least : float
        The share of blocks that the finest level has at least, by mass.
    caps : tuple of float or None
        Cosines of neighbours 1, 3 and 7 apart that a block must exceed for levels 2, 4 and 8.
    first : float
        The share of steps that run dense.
    order : str
        `hilbert`, which needs a grid to have an effect, or `none`.

    References
    ----------
    PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation (2025).
    """

    by: str = "quota"
    shares: tuple[float, ...] = (0.1, 0.15, 0.15, 0.35)
    rows: int = 128
    block: int = 64
    tile: int = 32
    least: float = 0.06
    caps: tuple[float, ...] | None = None
    first: float = 0.25
    order: str = "hilbert"

    card: ClassVar[Card] = Card(
        name="psa",
        topic="attention",
        role="step_attention",
        needs=(),
        patterns=("block",),
        year=2025,
        link="https://arxiv.org/abs/2512.04025",
        status="experimental",
    )

    def __post_init__(self) -> None:
        for name, choices in (("by", ("quota", "mass")), ("order", ("hilbert", "none"))):
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"PSA: {name} is {' or '.join(choices)}, not {getattr(self, name)!r}"
                )
        ends = tuple(self.shares) if isinstance(self.shares, tuple | list) else ()
        if len(ends) != len(LEVELS) or any(a > b for a, b in pairwise(ends)):
            raise UsageError(f"PSA: shares are four rising ends of levels, not {self.shares!r}")
        for end in ends:
            check_number("PSA", "shares", end, 0, 1)
        for name in ("rows", "block", "tile"):
            check_count("PSA", name, getattr(self, name))
        if self.rows % 8 or self.block % 8 or self.block < self.tile:
            raise UsageError(
                "PSA: rows and block are multiples of 8, and a tile is at most a block"
            )
        check_number("PSA", "least", self.least, 0, 1)
        check_number("PSA", "first", self.first, 0, 1)
        if self.caps is not None:
            for cap in self.caps:
                check_number("PSA", "caps", cap, -1, 1)
            if len(self.caps) != 3:
                raise UsageError(f"PSA: caps are three cosines, not {self.caps!r}")

    def attend(self, call: AttentionCall, step: DenoisingStep, state: object) -> Attended:
        """Dense at first, then over the pyramid."""
        if step.first_share(self.first):
            return answer_dense(call)
        order = None
        if step.grid is not None and self.order == "hilbert":
            order = space_filling(step.grid).to(call.query.device)
            query, key, value = (reordered(x, order) for x in (call.query, call.key, call.value))
            call = replace(call, query=query, key=key, value=value)
        with torch.no_grad():
            levels = self.choose(call, step)
        (output, _), pairs = pyramid(call, levels, self.rows, self.block)
        output = output if order is None else restored(output, order)
        return Attended(output, pairs)

    def choose(self, call: AttentionCall, step: DenoisingStep) -> Tensor:
        """int64 (batch, heads, query blocks, key blocks): a level, or 0 for skipped."""
        scores = sampled_mass(call, self.rows, self.block, SAMPLED)
        found = self.levels(scores)
        if self.caps is not None:
            cap = similarity_caps(call.key, self.block, self.caps)
            found = found.minimum(cap.repeat_interleave(call.shared, dim=1).unsqueeze(2))
        if step.grid is not None and step.grid.text:
            text = blocks_with(step.grid.text_at, call.keys, self.block, scores.device)
            found = found.masked_fill(text, 1)
        return found

    def levels(self, scores: Tensor) -> Tensor:
        """int64, the shape of scores (.., key blocks): what each rank in its row is given."""
        blocks = scores.shape[-1]
        rank = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        if self.by == "mass":
            mass = scores.sort(dim=-1, descending=True).values.cumsum(-1)
            reached = mass / mass[..., -1:]
        begin = rank.new_zeros(*rank.shape[:-1], 1)
        found = torch.zeros_like(rank)
        for level, share in zip(LEVELS, self.shares, strict=True):
            if self.by == "mass":
                count = (reached <= share + 1e-6).sum(-1, keepdim=True)
                end = torch.where(count > 0, count + 1, begin)
            else:
                end = begin.new_full(begin.shape, min(blocks, int(blocks * share)))
            end = _rounded(begin, end, blocks, -(-level // (self.block // self.tile)))
            if level == 1:
                least = int(blocks * self.least) + 1 if self.by == "mass" else 1
                end = end.clamp(min=min(blocks, least))
            found = torch.where((rank >= begin) & (rank < end), level, found)
            begin = end
        return found


def _rounded(begin: Tensor, end: Tensor, blocks: int, multiple: int) -> Tensor:
    """The end of an interval whose length is made a multiple: upward, or downward at the last."""
    length = (end - begin).clamp(min=0)
    end = begin + -(-length // multiple) * multiple
    over = end >= blocks
    return torch.where(over, begin + (blocks - begin) // multiple * multiple, end)


def similarity_caps(key: Tensor, block: int, caps: tuple[float, ...]) -> Tensor:
    """int64 (batch, kv_heads, key blocks): the coarsest level whose neighbours are alike."""
    length = key.shape[2]
    padded = torch.cat([key, key[:, :, -1:].expand(-1, -1, -length % block, -1)], dim=2).float()
    parts = padded.unflatten(2, (-1, block))
    found = torch.ones(parts.shape[:3], dtype=torch.int64, device=key.device)
    for level, cap in zip(LEVELS[1:], caps, strict=True):
        one, other = parts[:, :, :, ::level], parts[:, :, :, level - 1 :: level]
        alike = F.cosine_similarity(one, other, dim=-1).mean(-1)
        found = torch.where(alike > cap, level, found)
    return found


def pyramid(call: AttentionCall, levels: Tensor, rows: int, block: int) -> tuple[State, int]:
    """(output, log-sum-exp) over keys at the level of each tile, and the pairs computed."""
    found: State | None = None
    pairs = 0
    for level in LEVELS:
        mask = levels == level
        if not bool(mask.any()):
            continue
        part = over_means(call, mask, level, rows, block // level)
        pairs += count_pairs(part[1], lists_of(call))
        found = part[0] if found is None else merge(found, part[0])
    assert found is not None
    return found, pairs


def over_means(
    call: AttentionCall, mask: Tensor, group: int, rows: int, columns: int
) -> tuple[State, Layout]:
    """Attention over the means of `group` keys in a row, each with the logarithm of their number.

    mask: bool (batch, heads, query blocks, blocks of `columns` means).
    """
    key, value, bias = call.key, call.value, None
    if group > 1:
        key, value = (pooled(x, group).to(x.dtype) for x in (key, value))
        bias = sizes(call.keys, group, key.device).float().log().reshape(1, 1, -1)
    layout = Layout.from_blocks(mask, call.queries, key.shape[2], rows, columns)
    return attention(call.query, key, value, layout, scale=call.scale, key_bias=bias), layout
