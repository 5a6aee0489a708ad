"""Sparse-vDiT: one of five fixed patterns for each head, chosen offline by its error.

Heads of video transformers attend near tokens, the same place in all frames, or a few columns; some
matter little. A few dense samples are watched, and every head gets the pattern whose output lies
near the dense one for the least work: dense, skipped, a diagonal, a diagonal in the order that puts
all frames of a place together, or columns.

**Paper.** Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion
Transformers, 2025. https://arxiv.org/abs/2506.03065

**Claim.** 1.76 times faster on CogVideoX1.5 at a PSNR of 24 dB to the dense video.

**Defaults.** A penalty of 0.5 for computed pairs and a limit of 1 for the loss, as reported for the
paper. The widths of windows are not published: a fifth of the keys here, for all three patterns.

**Notes.** Calibrate first: `method = gs.calibrate_denoising(model, gs.attention.SparseVDiT(),
sample, steps=n, grid=grid)`. The loss is the squared error plus the penalty times the share that is
computed. In plain units the penalty would decide alone, so errors are over the mean square of the
layer's dense outputs, all heads together. A head that hardly adds to its layer is then skipped, and
one of small values alone is not. Losses are averaged over steps and samples; how the paper combines
them is not said. The columns are the key blocks with the most attention over all that was watched;
each call is judged by its own. Text is attended by all queries and attends everything, but for
skipped heads, which give zeros. The dense pattern wins where every loss is above the limit. Windows
are exact to the token; heads of one pattern run together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.denoising import Attended, DenoisingStep, TokenGrid
from gossamer.core.errors import UsageError
from gossamer.methods.attention.orders import band, frames_together, radius, reordered, restored
from gossamer.methods.attention.steps import (
    all_pairs,
    blocks_with,
    check_number,
    count_pairs,
    dense,
    everything,
    grid_of,
    lists_of,
    run,
    tile_mass,
)
from gossamer.methods.attention.tiles import check_count, check_share, from_blocks
from gossamer.ops.attention import Layout
from gossamer.ops.select import keep

MODES = ("dense", "skip", "diagonal", "frames", "columns")


class Watched(NamedTuple):
    """Of one call: losses (heads, modes), and attention (heads, key blocks)."""

    losses: Tensor
    mass: Tensor


@dataclass(frozen=True)
class SparseVDiT:
    """A fixed pattern for each head.

    Parameters
    ----------
    penalty : float
        What computing all pairs adds to the loss, from 0.
    limit : float
        Heads whose every loss is above it stay dense.
    window : float
        The share of keys that a diagonal or columns keep, in (0, 1].
    block : int
        Tokens of a block.
    modes : mapping of int to tuple of str
        By layer, one of MODES for each head; `gossamer.calibrate_denoising` makes them.
    columns : mapping of int to Tensor
        By layer, bool (heads, key blocks).

    References
    ----------
    Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers
    (2025).
    """

    penalty: float = 0.5
    limit: float = 1.0
    window: float = 0.2
    block: int = 64
    modes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    card: ClassVar[Card] = Card(
        name="sparsevdit",
        topic="attention",
        role="step_attention",
        needs=(),
        patterns=("block",),
        year=2025,
        link="https://arxiv.org/abs/2506.03065",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_number("SparseVDiT", "penalty", self.penalty, 0, float("inf"))
        check_number("SparseVDiT", "limit", self.limit, 0, float("inf"))
        check_share("SparseVDiT", "window", self.window)
        check_count("SparseVDiT", "block", self.block)

    def attend(self, call: AttentionCall, step: DenoisingStep, state: object) -> Attended:
        """Every head by its pattern."""
        grid = grid_of("SparseVDiT", call, step)
        modes = self.modes.get(call.layer)
        if modes is None:
            raise UsageError(
                f"SparseVDiT has no patterns for layer {call.layer}; make them with "
                "gs.calibrate_denoising(model, method, sample, steps=n, grid=grid)"
            )
        blocks = -(-call.keys // self.block)
        made = (len(modes), self.columns[call.layer].shape[-1])
        if made != (call.query.shape[1], blocks):
            raise UsageError(
                f"the patterns of layer {call.layer} are for {made[0]} heads and {made[1]} blocks, "
                f"and this call has {call.query.shape[1]} and {blocks}: calibrate again"
            )
        output = call.query.new_zeros(*call.query.shape[:3], call.value.shape[3])
        pairs = 0
        for mode in sorted(set(modes) - {"skip"}):
            heads = torch.tensor([h for h, each in enumerate(modes) if each == mode])
            found, count = self.apply(
                mode, _of_heads(call, heads), grid, self.columns[call.layer][heads]
            )
            output = output.index_copy(1, heads.to(output.device), found)
            pairs += count
        return Attended(output, pairs, None, "dense" if set(modes) == {"dense"} else "reused")

    def apply(
        self, mode: str, call: AttentionCall, grid: TokenGrid, columns: Tensor
    ) -> tuple[Tensor, int]:
        """The output of heads in one pattern, and the pairs that it takes."""
        if mode == "skip":
            return call.query.new_zeros(*call.query.shape[:3], call.value.shape[3]), 0
        layout = self.pattern(mode, call, grid, columns)
        count = count_pairs(layout, lists_of(call))
        if mode != "frames":
            return run(call, layout)[0], count
        order = frames_together(grid).to(call.query.device)
        query, key, value = (reordered(x, order) for x in (call.query, call.key, call.value))
        moved = run(replace(call, query=query, key=key, value=value), layout)[0]
        return restored(moved, order), count

    def pattern(self, mode: str, call: AttentionCall, grid: TokenGrid, columns: Tensor) -> Layout:
        """The pairs of one pattern; those of `frames` in the order of `frames_together`."""
        device = call.query.device
        if mode == "diagonal":
            return band(grid, 1, radius(self.window, grid.video), self.block, device)
        if mode == "frames":
            return band(grid, grid.frames, radius(self.window, grid.frame), self.block, device)
        if mode == "columns":
            text = blocks_with(grid.text_at, call.keys, self.block, device)
            kept = columns.to(device).unsqueeze(1) | text.unsqueeze(1) | text
            return from_blocks(kept, call, self.block)
        return everything(call.queries, call.keys, device, self.block)

    def observe_step(self, call: AttentionCall, step: DenoisingStep) -> Watched:
        """The loss of every pattern for every head, and where the attention is."""
        grid = grid_of("SparseVDiT", call, step)
        output, lse = dense(call)
        mass = tile_mass(call, lse, self.block, self.block).sum((0, 2))
        unit = output.double().square().mean()
        every = torch.arange(call.query.shape[1])
        whole = _of_heads(call, every)
        losses = []
        for mode in MODES:
            found, count = self.apply(mode, whole, grid, self.top_columns(mass))
            error = (found.double() - output.double()).square().mean((0, 2, 3)) / unit.clamp(
                min=1e-30
            )
            losses.append(error + self.penalty * count / all_pairs(call))
        return Watched(torch.stack(losses, dim=1).cpu(), mass.cpu())

    def top_columns(self, mass: Tensor) -> Tensor:
        """bool, the shape of (heads, key blocks): the share with the most attention."""
        return keep(mass, TopK(max(1, int(self.window * mass.shape[-1]))))

    def fitted(self, observed: Mapping[int, Sequence[Watched]]) -> SparseVDiT:
        """The same method with the pattern of the lowest mean loss for each head."""
        modes, columns = {}, {}
        for layer, seen in observed.items():
            losses = torch.stack([each.losses for each in seen]).mean(0)
            modes[layer] = tuple(self.mode_of(row) for row in losses.tolist())
            columns[layer] = self.top_columns(torch.stack([each.mass for each in seen]).sum(0))
        return replace(self, modes=modes, columns=columns)

    def mode_of(self, losses: Sequence[float]) -> str:
        """The pattern of the lowest loss, the first of equals; dense where all are too high."""
        best = min(range(len(losses)), key=losses.__getitem__)
        return MODES[0] if losses[best] > self.limit else MODES[best]


def _of_heads(call: AttentionCall, heads: Tensor) -> AttentionCall:
    """The call of some query heads, keys and values repeated for them."""
    own = heads // call.shared
    return replace(call, query=call.query[:, heads], key=call.key[:, own], value=call.value[:, own])
