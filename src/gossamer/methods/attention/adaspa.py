"""AdaSpa: key blocks by the exact attention of a few denoising steps, used again in between.

The first steps of a diffusion model run dense. Then the exact mass of every tile is computed, and
each block of queries keeps the key blocks with most of it. The choice serves until the next search,
which goes by the log-sum-exp of the first. Heads whose attention is concentrated keep fewer blocks,
and as many others keep more.

**Paper.** Training-free and Adaptive Sparse Attention for Efficient Long Video Generation, 2025.
https://arxiv.org/abs/2502.21079

**Claim.** 1.78 times faster on HunyuanVideo at a PSNR of 29 dB to the dense video.

**Defaults.** Sparsity 0.8 and blocks of 64; dense for the first fifth of the steps, and a second
search at three fifths, as 10 and 30 of 50 in the paper. Heads count as concentrated above a recall
of 0.8.

**Notes.** `density` covers the blocks that touch text, which are always kept, as long as they fit;
the paper adds them. Each block of queries keeps the same number of blocks within a head: a ranking
over all rows would starve some. Where more than half of the heads are concentrated the two groups
would overlap, so they are cut to half. Above a density of 2/3 the adaptation would ask for more
than everything, and is off. Recall is over the mass of the tiles rather than 1, for with an older
log-sum-exp that sum drifts. A run that begins behind the first search starts with one. Each element
of a batch has its own choice, so guidance in one batch is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.denoising import Attended, DenoisingStep
from gossamer.core.errors import UsageError
from gossamer.methods.attention.steps import (
    all_pairs,
    answer_dense,
    blocks_per_row,
    blocks_with,
    check_number,
    count_pairs,
    dense,
    lists_of,
    run,
    sizes,
    tile_mass,
)
from gossamer.methods.attention.tiles import check_count, check_share, from_blocks
from gossamer.ops.attention import Layout
from gossamer.ops.select import keep


class Found(NamedTuple):
    """The log-sum-exp of the first search, the last choice, and the step of the last search."""

    lse: Tensor
    layout: Layout
    number: int


@dataclass(frozen=True)
class AdaSpa:
    """The key blocks with the most attention at the last search.

    Parameters
    ----------
    density : float
        The share of pairs that is computed, in (0, 1].
    block : int
        Tokens of a block.
    first, again : float
        The first search comes after this share of the steps, which run dense, and further ones
        after each further share.
    adaptive : bool
        Whether concentrated heads give blocks to others.
    good : float
        The recall above which a head counts as concentrated.

    References
    ----------
    Training-free and Adaptive Sparse Attention for Efficient Long Video Generation (2025).
    """

    density: float = 0.2
    block: int = 64
    first: float = 0.2
    again: float = 0.4
    adaptive: bool = True
    good: float = 0.8

    card: ClassVar[Card] = Card(
        name="adaspa",
        topic="attention",
        role="step_attention",
        needs=(),
        patterns=("block",),
        year=2025,
        link="https://arxiv.org/abs/2502.21079",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_share("AdaSpa", "density", self.density)
        check_count("AdaSpa", "block", self.block)
        check_number("AdaSpa", "first", self.first, 0, 1)
        check_number("AdaSpa", "good", self.good, 0, 1)
        if not isinstance(self.again, int | float) or not self.again > 0:
            raise UsageError(f"AdaSpa: again is a share of the steps above 0, not {self.again!r}")

    def attend(self, call: AttentionCall, step: DenoisingStep, state: Found | None) -> Attended:
        """Dense at first, then over the blocks of the last search."""
        if step.first_share(self.first) and state is None:
            return answer_dense(call)
        if state is None:
            output, lse = dense(call)
            with torch.no_grad():
                kept = self.choose(call, step, tile_mass(call, lse, self.block, self.block))
            found = Found(lse.detach(), from_blocks(kept, call, self.block), step.number)
            return Attended(output, all_pairs(call), found, "dense", all_pairs(call))
        searching = self._searches(step, state.number)
        if searching:
            with torch.no_grad():
                mass = tile_mass(call, state.lse, self.block, self.block)
                layout = from_blocks(self.choose(call, step, mass), call, self.block)
                state = Found(state.lse, layout, step.number)
        output, _ = run(call, state.layout)
        pairs = count_pairs(state.layout, lists_of(call))
        if searching:
            return Attended(output, pairs, state, "chosen", all_pairs(call))
        return Attended(output, pairs, state, "reused")

    def _searches(self, step: DenoisingStep, last: int) -> bool:
        """Whether a further search is due since the last one."""

        def done(number: int) -> int:
            return int((number - self.first * step.total) / (self.again * step.total) + 1e-9)

        return done(step.number) > done(last)

    def choose(self, call: AttentionCall, step: DenoisingStep, mass: Tensor) -> Tensor:
        """bool, the shape of the masses."""
        text = torch.zeros(mass.shape[-1], dtype=torch.bool, device=mass.device)
        if step.grid is not None:
            text = blocks_with(step.grid.text_at, call.keys, self.block, mass.device)
        count = sizes(call.keys, self.block, mass.device)

        def kept(density: float) -> Tensor:
            blocks = blocks_per_row(min(1.0, density), count, count, text)
            return keep(mass, TopK(blocks), always=text) | text.unsqueeze(-1)

        even = kept(self.density)
        if not self.adaptive or self.density > 2 / 3:
            return even
        best, worst = self.groups((mass * even).sum((2, 3)) / mass.sum((2, 3)))
        fewer, more = kept(self.density / 2), kept(1.5 * self.density)
        chosen = torch.where(best[..., None, None], fewer, even)
        return torch.where(worst[..., None, None], more, chosen)

    def groups(self, recall: Tensor) -> tuple[Tensor, Tensor]:
        """bool (batch, heads) each: the heads that keep fewer blocks, and as many that keep more."""
        count = (recall > self.good).sum(-1, keepdim=True).clamp(max=recall.shape[-1] // 2)
        rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return rank < count, rank >= recall.shape[-1] - count
