"""Light Forcing: frames first, then blocks, under a budget that shrinks from chunk to chunk.

An autoregressive video model makes a few frames at a time and attends all that came before. The
first chunk is dense. Later ones are the sparser the later they come, for errors of early chunks are
handed on. Each block of queries chooses frames by their mean key, then blocks within those.

**Paper.** Light Forcing: Accelerating Autoregressive Video Diffusion via Sparse Attention, 2026.
https://arxiv.org/abs/2602.04789

**Claim.** Self Forcing 1.3B with it scores 84.5 in VBench, against 84.1 dense, and runs 1.2 to 1.3
times faster from end to end.

**Defaults.** A target density of 0.15 and a base of 0.05, 7 chunks, 6 chosen frames and blocks of
128, as a port of the paper has them. The authors' code was not seen.

**Notes.** A chunk's sparsity is base - alpha beta, where alpha falls as 1 / sqrt(frames so far); the
paper's own alpha is not confirmed. beta makes what chunks spend equal the target, over the chunks
behind the first. Cutting a sparsity to [0, 0.999] breaks that, so beta is solved with the cut in
place. `schedule` swaps in flat or rising budgets, to compare. The first frame, the last one before
the chunk and the chunk's own are always candidates, and their blocks use up the budget like others.
Choices are made for each layer, head and call. A block that two frames share is a candidate where
either is. Tune the model with this attention in place: without, the paper's quality falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.denoising import Attended, DenoisingStep, TokenGrid
from gossamer.core.errors import UsageError
from gossamer.methods.attention.steps import (
    answer_dense,
    count_pairs,
    grid_of,
    lists_of,
    run,
)
from gossamer.methods.attention.tiles import (
    check_count,
    check_share,
    from_blocks,
    pooled,
    products,
)
from gossamer.ops.select import keep

LEAST = 0.001
"""The least density of a chunk."""
SCHEDULES = ("growing", "flat", "shrinking")


@dataclass(frozen=True)
class LightForcing:
    """Frames, then blocks, for each chunk of an autoregressive video.

    Parameters
    ----------
    density : float
        The share of pairs behind the first chunk that is computed, in (0, 1].
    base : float
        The density that late chunks approach, at most `density`.
    chunks : int
        How many the video has, the first included.
    frames : int
        Chosen frames for each block of queries, beside the first, the last and the chunk's own.
    block : int
        Tokens of a block.
    schedule : str
        `growing` sparsity; `flat` and `shrinking` are for comparison.

    References
    ----------
    Light Forcing: Accelerating Autoregressive Video Diffusion via Sparse Attention (2026).
    """

    density: float = 0.15
    base: float = 0.05
    chunks: int = 7
    frames: int = 6
    block: int = 128
    schedule: str = "growing"

    card: ClassVar[Card] = Card(
        name="lightforcing",
        topic="attention",
        role="step_attention",
        needs=(),
        patterns=("block",),
        year=2026,
        link="https://arxiv.org/abs/2602.04789",
        status="experimental",
    )
    autoregressive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("LightForcing", "density", self.density)
        check_share("LightForcing", "base", self.base)
        for name in ("chunks", "block"):
            check_count("LightForcing", name, getattr(self, name))
        check_count("LightForcing", "frames", self.frames, 0)
        if self.base > self.density:
            raise UsageError(
                f"LightForcing: base {self.base} is at most density {self.density}: chunks approach "
                "it from above"
            )
        if self.schedule not in SCHEDULES:
            raise UsageError(
                f"LightForcing: schedule is {', '.join(SCHEDULES)}, not {self.schedule!r}"
            )

    def attend(self, call: AttentionCall, step: DenoisingStep, state: object) -> Attended:
        """The first chunk dense, later ones over the chosen blocks."""
        grid = grid_of("LightForcing", call, step)
        chunk, rest = divmod(call.past, grid.tokens)
        if rest or grid.text or chunk >= self.chunks:
            raise UsageError(
                f"LightForcing: {call.past} keys before a chunk of {grid.tokens} tokens in a video "
                f"of {self.chunks} chunks without text among them; whole chunks come before"
            )
        if not chunk:
            return answer_dense(call)
        with torch.no_grad():
            kept = self.choose(call, grid, self.densities(grid)[chunk - 1])
            layout = from_blocks(kept, call, self.block)
        return Attended(run(call, layout)[0], count_pairs(layout, lists_of(call)))

    def densities(self, grid: TokenGrid) -> list[float]:
        """Of each chunk behind the first."""
        works = [float(i + 1) for i in range(1, self.chunks)]  # keys, in chunks
        if not works or self.schedule == "flat":
            return [self.density] * len(works)
        shares = [((i + 1) * grid.frames) ** -0.5 for i in range(1, self.chunks)]
        if self.schedule == "shrinking":
            shares.reverse()
        return spent(shares, works, self.base, self.density)

    def choose(self, call: AttentionCall, grid: TokenGrid, density: float) -> Tensor:
        """bool (batch, heads, query blocks, key blocks)."""
        query = pooled(call.query, self.block)
        candidates = self.candidates(call, grid, query)
        scores = products(query, pooled(call.key, self.block))
        scores = scores.masked_fill(~candidates, -torch.inf)
        return keep(scores, TopK(max(1, int(density * scores.shape[-1] + 1e-9))))

    def candidates(self, call: AttentionCall, grid: TokenGrid, query: Tensor) -> Tensor:
        """bool (batch, heads, query blocks, key blocks): those with a token of a chosen frame."""
        device = call.query.device
        frames, before = call.keys // grid.frame, call.past // grid.frame
        scores = products(query, pooled(call.key, grid.frame))
        place = torch.arange(frames, device=device)
        always = (place == 0) | (place >= before - 1)
        chosen = keep(scores.masked_fill(always, -torch.inf), TopK(self.frames)) | always
        first = torch.arange(0, call.keys, self.block, device=device)
        last = (first + self.block).clamp(max=call.keys) - 1
        touches = (place >= (first // grid.frame).unsqueeze(1)) & (
            place <= (last // grid.frame).unsqueeze(1)
        )
        return chosen.float() @ touches.float().T > 0


def spent(shares: list[float], works: list[float], base: float, target: float) -> list[float]:
    """Densities base + beta share, cut to [LEAST, 1], that spend the target share of the work."""

    def densities(beta: float) -> list[float]:
        return [min(1.0, max(LEAST, base + beta * share)) for share in shares]

    def spends(beta: float) -> float:
        return sum(w * d for w, d in zip(works, densities(beta), strict=True))

    low, high, wanted = 0.0, 1.0, target * sum(works)
    while spends(high) < wanted and high < 1e9:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if spends(middle) < wanted else (low, middle)
    return densities(high)
