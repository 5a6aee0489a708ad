"""MoA: a window for each head, planned offline, that grows with the text as far as the head needs.

Each head keeps the first block and a window of `alpha + beta * length` keys. Gradients of the
model's own answers say what each head loses by a shorter window. An integer programme gives every
head the rule that loses least at the density that was asked for. The plan then serves any length.

**Paper.** MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, 2024.
https://arxiv.org/abs/2406.14909

**Claim.** At half the density, 3.9 times the effective context of uniform windows, and 1.5 to 7.1
times their accuracy of retrieval. Tests compare the influence of a pair with the change that its removal
makes, and the plan with an exhaustive search.

**Defaults.** Density 0.5, blocks of 64, beta from 0 to 1 in eighths, alpha in steps of 1,024 from
minus the shortest length, at most 2 rules a layer, as the paper. Answers of 32 tokens are a choice
of this library.

**Notes.** Calibrate first, on prompts of two or more lengths:
`method = gs.calibrate_attention(model, gs.attention.MoA(), data)`. The longest length chooses among
the plans and is not planned for. The loss is that of the model's own greedy answers. The influence
of a pair renormalises the rest of its row. Absolute values are summed by tile, one block of queries
at a time, so that no map is held. Windows are whole blocks, rounded down as in
the release, and one first block is always counted. Heads that share keys share a rule, so that
their cache can follow it. Windows go by the length of the whole prompt, so a longer one changes
what early queries see. Density is that of the cache, as in the paper: kept keys of the last
query over all. Of the causal pairs a window keeps more. The release keeps plans within boxes of
every loss; ours are bounded from above only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.moa_plan import Plan, plan_of
from gossamer.methods.attention.tiles import (
    check_causal,
    check_count,
    check_share,
    from_blocks,
    products,
)
from gossamer.ops.attention import Layout

Seen = tuple[int, Tensor]
"""The length of a prompt, and its influence by distance (kv_heads, blocks)."""


@dataclass(frozen=True)
class MoA:
    """The first block and, of each head, its own window.

    Parameters
    ----------
    density : float
        The share of keys that a cache by the plan keeps, in (0, 1]; a tenth less is allowed.
    block : int
        Tokens of a block.
    step : int
        Between the values of alpha, in tokens.
    rules : int
        How many different rules the heads of a layer may have.
    answer : int
        Tokens of the model's own answer to each prompt, on which its loss is taken.
    plan : Plan, str or None
        What `gossamer.calibrate_attention` made, or the path of its file.

    References
    ----------
    MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2024).
    """

    density: float = 0.5
    block: int = 64
    step: int = 1024
    rules: int = 2
    answer: int = 32
    plan: Plan | str | None = field(default=None, repr=False)

    card: ClassVar[Card] = Card(
        name="moa",
        topic="attention",
        role="key_scorer",
        needs=(),
        patterns=("block",),
        year=2024,
        link="https://arxiv.org/abs/2406.14909",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_share("MoA", "density", self.density)
        for name in ("block", "step", "rules", "answer"):
            check_count("MoA", name, getattr(self, name))
        if isinstance(self.plan, str):
            object.__setattr__(self, "plan", Plan.load(Path(self.plan)))

    def layout(self, call: AttentionCall) -> Layout:
        """The first block and each head's window, in whole blocks."""
        check_causal("MoA", call)
        plan = self._checked(call)
        counts = plan.windows(call.layer, call.keys)
        windows = torch.tensor(counts, device=call.query.device).reshape(-1, 1, 1)
        possible = call.possible_blocks(plan.block, plan.block)
        first = torch.arange(0, call.queries, plan.block, device=possible.device) + call.past
        own = (first // plan.block).unsqueeze(1)
        column = torch.arange(possible.shape[1], device=possible.device)
        kept = possible & ((column == 0) | (column > own - windows))
        return from_blocks(kept.unsqueeze(0), call, plan.block)

    def observe_gradient(self, call: AttentionCall, gradient: Tensor) -> Seen:
        """What a call says of distances, given the loss's gradient of its output."""
        check_causal("MoA", call)
        tiles = influence(call, gradient, self.block)
        grouped = tiles.sum(0).unflatten(0, (call.key.shape[1], -1)).sum(1)
        return call.keys, by_distance(grouped).cpu()

    def fitted(self, observed: Mapping[int, Sequence[Seen]]) -> MoA:
        """The same method with a plan for the model's layers."""
        return replace(
            self, plan=plan_of(observed, self.density, self.block, self.step, self.rules)
        )

    def save(self, path: Path | str) -> None:
        """Write the plan to a JSON file, which `plan` takes again.

        Raises UsageError where there is no plan yet.
        """
        if not isinstance(self.plan, Plan):
            raise UsageError("MoA has no plan to save; make one with gs.calibrate_attention")
        self.plan.save(Path(path))

    def _checked(self, call: AttentionCall) -> Plan:
        if not isinstance(self.plan, Plan):
            raise UsageError(
                "MoA has no plan; make one with gs.calibrate_attention(model, method, data), or "
                "give the path of a saved one"
            )
        heads = call.key.shape[1]
        if len(self.plan.rules) != call.layers or len(self.plan.rules[call.layer]) != heads:
            raise UsageError(
                f"the plan of MoA is for {len(self.plan.rules)} layers of "
                f"{len(self.plan.rules[0])} heads of keys, and this model has {call.layers} of "
                f"{heads}: it was made for another model"
            )
        return self.plan


def influence(call: AttentionCall, gradient: Tensor, block: int) -> Tensor:
    """The sum of |E| over each tile, (batch, heads, query blocks, key blocks).

    E is the first-order change of the loss when a pair is removed and its row renormalised. One
    block of queries at a time; gradient: of the loss, by the output.
    """
    key, value, rows = _wide(call.key), _wide(call.value), []
    place = torch.arange(call.keys, device=key.device)
    for first in range(0, call.queries, block):
        part = slice(first, min(first + block, call.queries))
        now = torch.arange(part.start, part.stop, device=key.device).unsqueeze(1) + call.past
        logits = products(_wide(call.query[:, :, part]) * call.scale, key)
        weights = logits.masked_fill(place > now, -torch.inf).softmax(-1)
        slopes = products(_wide(gradient[:, :, part]), value)
        change = removal(weights, slopes).abs().sum(2)
        padded = torch.nn.functional.pad(change, (0, -call.keys % block))
        rows.append(padded.unflatten(-1, (-1, block)).sum(-1))
    return torch.stack(rows, dim=2)


def removal(weights: Tensor, slopes: Tensor) -> Tensor:
    """-A (G - sum of G A over the row) / (1 - A): the loss's change when each pair is removed.

    -A G where a row has one key alone, as nothing is left to be renormalised.
    """
    rest = 1 - weights
    alone = rest < 8 * torch.finfo(weights.dtype).eps
    mean = (weights * slopes).sum(-1, keepdim=True)
    return -weights * torch.where(alone, slopes, (slopes - mean) / rest.where(~alone, 1.0))


def by_distance(tiles: Tensor) -> Tensor:
    """(heads, blocks): sums over diagonals of a lower triangle, without the first column."""
    blocks = tiles.shape[-1]
    kept = tiles.clone()
    kept[..., 0] = 0
    sums = [kept.diagonal(-distance, dim1=-2, dim2=-1).sum(-1) for distance in range(blocks)]
    return torch.stack(sums, dim=-1)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
