"""SeerAttention: key blocks by a gate that learned the model's own attention.

A small gate for each layer sees averages of queries and extremes of keys by block, before the
model's rotation. It is trained to give the largest attention of each tile of the dense map. In a
prompt each block of queries takes the key blocks whose gate is high.

**Paper.** SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, 2024.
https://arxiv.org/abs/2410.13276

**Claim.** At 32k tokens, 90% sparsity with minimal loss of perplexity. Tests
compare gate, masks, target and loss with the release's outputs.

**Defaults.** Blocks of 64, gates of width 128, AdamW at 1e-3 with cosine decay, warm-up of 20 and
500 steps, as the paper; one text a step instead of 16. Threshold 2e-3; the paper suggests 5e-4 to
5e-3.

**Notes.** Calibrate first: `method = gs.calibrate_attention(model, gs.attention.SeerAttention(),
data)`. The target is a maximum, because an average erases single hot cells. The loss is the
release's: 10 times the mean over all elements, without the first quarter of block rows. With
`density` each row takes (1 - sqrt(1 - density)) times the number of blocks, over the whole row and
before later blocks are cut, at least one; the formula is that of a triangle. The last two block
rows are dense. A row of which no gate is above the threshold takes its highest. The gate sees
queries and keys before rotation, which is undone here from the model's frequencies, for texts whose
positions count from 0. Each query head chooses for itself, by whole blocks of queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.budget import Threshold, TopK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import (
    check_causal,
    check_count,
    check_share,
    from_blocks,
    pooled,
    products,
)
from gossamer.nn.attention_gate import BlockGate, key_features, rotated
from gossamer.ops.attention import Layout, attention
from gossamer.ops.select import keep

_HIDDEN = -1e9
Features = dict[str, Tensor]


@dataclass(frozen=True)
class SeerAttention:
    """The key blocks whose learned gate is high.

    Parameters
    ----------
    threshold : float
        Gates above it are taken, of a row that sums to 1.
    density : float or None
        Instead of `threshold`: the share of blocks of a triangular map, in (0, 1].
    block : int
        Tokens of a block.
    width : int
        Of the gate.
    steps : int
        Of training, each on one text.
    rate : float
        The highest learning rate.
    seed : int
        Of the gates' first weights.
    gates : mapping of int to BlockGate
        By layer; `gossamer.calibrate_attention` makes them.

    References
    ----------
    SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (2024).
    """

    threshold: float = 2e-3
    density: float | None = None
    block: int = 64
    width: int = 128
    steps: int = 500
    rate: float = 1e-3
    seed: int = 0
    gates: Mapping[int, BlockGate] = field(default_factory=dict, repr=False, compare=False)

    card: ClassVar[Card] = Card(
        name="seerattention",
        topic="attention",
        role="key_scorer",
        needs=(),
        patterns=("block",),
        year=2024,
        link="https://arxiv.org/abs/2410.13276",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_share("SeerAttention", "threshold", self.threshold)
        if self.density is not None:
            check_share("SeerAttention", "density", self.density)
        for name in ("block", "width", "steps"):
            check_count("SeerAttention", name, getattr(self, name))
        if self.width % 2:
            raise UsageError(f"SeerAttention: width is even, not {self.width}")

    def layout(self, call: AttentionCall) -> Layout:
        """The tiles whose gate is high, and the last two block rows."""
        check_causal("SeerAttention", call)
        gates = self.score(call)
        kept = self.choose(gates) & call.possible_blocks(self.block, self.block)
        return from_blocks(last_rows_dense(kept, call, self.block), call, self.block)

    def score(self, call: AttentionCall) -> Tensor:
        """The gate's softmax over key blocks, (batch, heads, query blocks, key blocks)."""
        gate = self.gates.get(call.layer)
        if gate is None:
            raise UsageError(
                f"SeerAttention has no gate for layer {call.layer}; make them with "
                "gs.calibrate_attention(model, method, data)"
            )
        seen = features(call, self.block)
        have = (call.query.shape[1], call.key.shape[1], call.query.shape[3])
        made = (gate.query.shape[0], gate.key.shape[0], gate.query.shape[1])
        if have != made:
            raise UsageError(
                f"the gate of layer {call.layer} is for (heads, kv heads, width) {made}, and this "
                f"model has {have}: it was calibrated on another model"
            )
        logits = gate.to(call.query.device)(seen["query"], seen["key"], self.block, call.past)
        return masked(logits, call.possible_blocks(self.block, self.block)).softmax(-1)

    def choose(self, gates: Tensor) -> Tensor:
        """bool, the shape of the gates."""
        highest = keep(gates, TopK(1))
        if self.density is None:
            return keep(gates, Threshold(self.threshold)) | highest
        count = int((1 - math.sqrt(1 - self.density)) * gates.shape[-1])
        return keep(gates, TopK(max(1, count)))

    def observe(self, call: AttentionCall) -> Features:
        """What is learned from one call: the blocks' features and the target."""
        check_causal("SeerAttention", call)
        return features(call, self.block) | {"target": block_maxima(call, self.block)}

    def fitted(self, observed: Mapping[int, Sequence[Features]]) -> SeerAttention:
        """The same method with a gate for each layer, trained on what was observed."""
        return replace(self, gates={i: self._trained(i, seen) for i, seen in observed.items()})

    def _trained(self, layer: int, observed: Sequence[Features]) -> BlockGate:
        first = observed[0]
        heads, kv_heads, width = first["query"].shape[1], *first["key"].shape[1::2]
        generator = torch.Generator().manual_seed(self.seed + layer)
        gate = BlockGate(heads, kv_heads, width // 3, self.width, generator)
        gate = gate.to(first["query"].device)
        optimizer = torch.optim.AdamW(gate.parameters(), self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_at)
        with torch.enable_grad():
            for step in range(self.steps):
                seen = observed[step % len(observed)]
                logits = gate(seen["query"], seen["key"], self.block)
                possible = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
                loss = distillation(masked(logits, possible.to(logits.device)), seen["target"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return gate.requires_grad_(False).eval()

    def _rate_at(self, step: int) -> float:
        """Warm-up of 20 steps, then half a cosine."""
        rising = min(1.0, (step + 1) / 20)
        return rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def features(call: AttentionCall, block: int) -> Features:
    """Means of queries, and maxima, minima and means of keys, before the model's rotation."""
    query, key = call.query.float(), call.key.float()
    if call.rotation is not None:
        undo = -call.rotation.float()
        places = torch.arange(call.keys, device=key.device)
        query, key = rotated(query, places[call.past :], undo), rotated(key, places, undo)
    return {"query": pooled(query, block), "key": key_features(key, block)}


def masked(logits: Tensor, possible: Tensor) -> Tensor:
    """With the release's number in place of minus infinity."""
    return logits.masked_fill(~possible, _HIDDEN)


def last_rows_dense(kept: Tensor, call: AttentionCall, block: int) -> Tensor:
    """With every possible block in the last two rows."""
    whole = kept.clone()
    whole[:, :, -2:] = call.possible_blocks(block, block)[-2:]
    return whole


def distillation(logits: Tensor, target: Tensor) -> Tensor:
    """10 times the mean, over all elements, of KL(target, gate), without the first quarter of rows."""
    rows = logits.shape[-2] // 4
    gates = logits[:, :, rows:].log_softmax(-1)
    total = torch.nn.functional.kl_div(gates, target[:, :, rows:], reduction="sum")
    return 10 * total / gates.numel()


def block_maxima(call: AttentionCall, block: int) -> Tensor:
    """The largest attention of each tile of the dense map, each row over its sum.

    (batch, heads, query blocks, key blocks); one block of queries at a time.
    """
    tiles = from_blocks(call.possible_blocks(block, block), call, block)
    _, lse = attention(
        call.query, call.key, call.value, tiles, causal=call.causal, scale=call.scale
    )
    key, rows = call.key.float(), []
    place = torch.arange(call.keys, device=key.device)
    for first in range(0, call.queries, block):
        part = slice(first, min(first + block, call.queries))
        logits = products(call.query[:, :, part].float() * call.scale, key)
        weights = (logits - lse[:, :, part].unsqueeze(-1)).exp()
        now = torch.arange(part.start, part.stop, device=key.device).unsqueeze(1) + call.past
        weights = weights.masked_fill(place > now, 0).amax(2)
        padded = torch.nn.functional.pad(weights, (0, -call.keys % block))
        rows.append(padded.unflatten(-1, (-1, block)).amax(-1))
    found = torch.stack(rows, dim=2)
    return found / found.sum(-1, keepdim=True)
