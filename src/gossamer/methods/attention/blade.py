"""Video-BLADE: blocks of most of the attention beside the means of all, trained while steps are cut.

A sample of tokens says which blocks hold 95% of each row's attention. Those are attended whole; all
keys are attended once more as means of a few neighbours; both are weighed by their sums. It is meant
to be trained with, while a sampler is distilled to a few steps.

**Paper.** Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video
Generation, 2025. https://arxiv.org/abs/2508.10774

**Claim.** Wan2.1-1.3B runs 14.1 times faster than with 50 dense steps, and VBench-2.0 rises from
0.563 to 0.570. The claim was not tried here; `attention_video.json` holds what the attention keeps in
the bundled video transformer, without training for it.

**Defaults.** Blocks of 128, 32 sampled tokens of each, 95% of a row within 5% and 10% of the blocks,
means of 15, as for CogVideoX.

**Notes.** As published the means cover all keys, so kept ones count twice. `disjoint=True` takes
means only of blocks that are not kept, and merges exactly; a mean must then lie within a block, so
`pool` divides it. A mean's logit is raised by the logarithm of its number of keys. The last two rows
and columns of blocks are always kept; text, which comes last in our order, is in them or kept with
them. Samples are every fourth token rather than drawn, so a choice repeats; it is made anew in every
call. Video tokens follow a Hilbert curve. The choice has no gradient. To train with it, open
`gs.sparse_denoising` around `gs.distil_steps`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.budget import TopK, TopP
from gossamer.core.card import Card
from gossamer.core.denoising import Attended, DenoisingStep, TokenGrid
from gossamer.core.errors import UsageError
from gossamer.methods.attention.orders import reordered, restored, space_filling
from gossamer.methods.attention.psa import over_means
from gossamer.methods.attention.steps import (
    answer_dense,
    check_number,
    count_pairs,
    lists_of,
    sampled_mass,
)
from gossamer.methods.attention.tiles import check_count, check_share
from gossamer.ops.attention import merge
from gossamer.ops.select import keep

SAMPLED = 4


@dataclass(frozen=True)
class VideoBLADE:
    """Blocks with most of the attention, and means of keys.

    Parameters
    ----------
    share : float
        Of a row's estimated attention that its blocks hold, in (0, 1].
    least, most : float
        Shares of the blocks between which a row keeps.
    pool : int
        Keys of a mean.
    block : int
        Tokens of a block, a multiple of 4.
    disjoint : bool
        Whether means leave out the blocks that are kept.
    first : float
        The share of steps that run dense.

    References
    ----------
    Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation
    (2025).
    """

    share: float = 0.95
    least: float = 0.05
    most: float = 0.1
    pool: int = 15
    block: int = 128
    disjoint: bool = False
    first: float = 0.0

    card: ClassVar[Card] = Card(
        name="videoblade",
        topic="attention",
        role="step_attention",
        needs=(),
        patterns=("block",),
        year=2025,
        link="https://arxiv.org/abs/2508.10774",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_share("VideoBLADE", "share", self.share)
        check_share("VideoBLADE", "most", self.most)
        check_number("VideoBLADE", "least", self.least, 0, self.most)
        check_number("VideoBLADE", "first", self.first, 0, 1)
        check_count("VideoBLADE", "pool", self.pool)
        check_count("VideoBLADE", "block", self.block)
        if self.block % SAMPLED:
            raise UsageError(f"VideoBLADE: block is a multiple of {SAMPLED}, not {self.block}")
        if self.disjoint and self.block % self.pool:
            raise UsageError(
                f"VideoBLADE: with disjoint, pool {self.pool} divides block {self.block}"
            )

    def attend(self, call: AttentionCall, step: DenoisingStep, state: object) -> Attended:
        """Blocks and means, weighed by their sums."""
        if step.first_share(self.first):
            return answer_dense(call)
        order = None
        if step.grid is not None:
            order = text_last(step.grid).to(call.query.device)
            query, key, value = (reordered(x, order) for x in (call.query, call.key, call.value))
            call = replace(call, query=query, key=key, value=value)
        with torch.no_grad():
            kept = self.choose(call, 0 if step.grid is None else step.grid.text)
        (output, lse), layout = over_means(call, kept, 1, self.block, self.block)
        pairs = count_pairs(layout, lists_of(call))
        rest = self.rest(kept, call)
        if bool(rest.any()):
            columns = self.block // self.pool if self.disjoint else self.block
            means, layout = over_means(call, rest, self.pool, self.block, columns)
            pairs += count_pairs(layout, lists_of(call))
            output, _ = merge((output, lse), means)
        return Attended(output if order is None else restored(output, order), pairs)

    def choose(self, call: AttentionCall, text: int) -> Tensor:
        """bool (batch, heads, query blocks, key blocks)."""
        mass = sampled_mass(call, self.block, self.block, SAMPLED)
        blocks = mass.shape[-1]
        most, least = max(1, int(self.most * blocks)), -int(-self.least * blocks // 1)
        kept = keep(mass, TopP(self.share)) & keep(mass, TopK(most))
        kept |= keep(mass, TopK(max(1, least)))
        ends = max(2, -(-text // self.block) + 1 if text else 2)
        kept[..., -ends:] = True
        kept[..., -ends:, :] = True
        return kept

    def rest(self, kept: Tensor, call: AttentionCall) -> Tensor:
        """bool (.., query blocks, blocks of means): where means are attended."""
        if self.disjoint:
            return ~kept
        means = -(-call.keys // self.pool)
        return kept.new_ones(1, 1, kept.shape[2], -(-means // self.block))


def text_last(grid: TokenGrid) -> Tensor:
    """int64 (tokens,): the video along a Hilbert curve, then text."""
    order = space_filling(grid)
    if not grid.text_first:
        return order
    return torch.cat([order[grid.text :], order[: grid.text]])
