"""SparseD: key blocks chosen once for each head, after the first steps of a diffusion language model.

A masked diffusion model fills in a text over many steps, and each of its heads looks at much the
same places from some early step on. The first steps run dense. At the last of them every block of
queries chooses its key blocks from the exact map, and keeps them to the end.

**Paper.** SparseD: Sparse Attention for Diffusion Language Models, 2025.
https://arxiv.org/abs/2509.24014

**Claim.** Nearly lossless, and 1.50 times faster than FlashAttention at 64k tokens with 1,024
steps. The claim was not tried here.

**Defaults.** A fifth of the steps dense, 30% of the blocks of 128, as for prompts from 4k tokens.
For short ones the paper takes half of the blocks of 32.

**Notes.** `prompt` says how many tokens at the start were given. Blocks of the generated part are
chosen by a softmax of their own, over generated keys only, or else the prompt would leave them
none; the same share of them is kept. A block that holds the end of the prompt counts as generated.
A tile's score is its mean attention, over real entries; the release averages ragged tiles with
their padding, which ranks them too low. Its estimate also divides logits by the root of the number
of heads, ours by that of the width, as attention does. Dense are the steps 0 to floor(share *
steps) + 1. Where a model generates block after block, steps count on over all blocks. A run that
begins behind the dense steps chooses in its first. Attention is to both sides, and calls are those
of `gs.sparse_denoising`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

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


@dataclass(frozen=True)
class SparseD:
    """The key blocks with the most attention at the last dense step.

    Parameters
    ----------
    share : float
        Of the key blocks that each block of queries keeps, in (0, 1]; one more is kept.
    block : int
        Tokens of a block.
    first : float
        The share of the steps that run dense, two more than that.
    prompt : int
        Tokens at the start that are given, and not generated.

    References
    ----------
    SparseD: Sparse Attention for Diffusion Language Models (2025).
    """

    share: float = 0.3
    block: int = 128
    first: float = 0.2
    prompt: int = 0

    card: ClassVar[Card] = Card(
        name="sparsed",
        topic="attention",
        role="step_attention",
        needs=(),
        patterns=("block",),
        year=2025,
        link="https://arxiv.org/abs/2509.24014",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_share("SparseD", "share", self.share)
        check_count("SparseD", "block", self.block)
        check_count("SparseD", "prompt", self.prompt, 0)
        check_number("SparseD", "first", self.first, 0, 1)

    def attend(self, call: AttentionCall, step: DenoisingStep, state: Layout | None) -> Attended:
        """Dense at first, then over the blocks of the one choice."""
        last = int(self.first * step.total + 1e-9) + 1
        if step.number < last:
            return answer_dense(call)
        if state is not None:
            output, _ = run(call, state)
            return Attended(output, count_pairs(state, lists_of(call)), state, "reused")
        output, lse = dense(call)
        with torch.no_grad():
            layout = from_blocks(self.choose(call, lse), call, self.block)
        searched = all_pairs(call) * (1 if not self.prompt else 2)
        return Attended(output, all_pairs(call), layout, "dense", searched)

    def choose(self, call: AttentionCall, lse: Tensor) -> Tensor:
        """bool (batch, heads, query blocks, key blocks), given the log-sum-exp over all keys."""
        if self.prompt > call.keys:
            raise UsageError(f"SparseD: a prompt of {self.prompt} tokens in a text of {call.keys}")
        given = self.prompt // self.block
        kept = self._top(call, lse)
        if not given or given * self.block >= call.keys:
            return kept
        key, value = (x[:, :, given * self.block :] for x in (call.key, call.value))
        generated = replace(call, key=key, value=value)
        kept[..., given:] = self._top(generated, dense(generated)[1])
        return kept

    def _top(self, call: AttentionCall, lse: Tensor) -> Tensor:
        """The blocks with the highest mean attention, as many as the share of those there are."""
        mass = tile_mass(call, lse, self.block, self.block)
        means = mass / sizes(call.keys, self.block, mass.device)
        return keep(means, TopK(int(means.shape[-1] * self.share + 1e-9) + 1))
