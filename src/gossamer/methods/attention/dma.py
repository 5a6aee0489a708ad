"""DMA: attention to the keys whose values a learned gate finds important.

A small projection of all values gives each key a bias. Each query attends the keys with the highest
biases among those it may see, and the bias is added to their logits, which is how the gate learns.

**Paper.** Trainable Dynamic Mask Sparse Attention, 2025. https://arxiv.org/abs/2508.02124

**Claim.** Better perplexity than dense attention, sliding windows, latent attention and native
sparse attention at equal training, and better retrieval than dense attention at 1.7 billion
parameters. The claim was not tried here.

**Defaults.** 2,048 keys, as the released model; slopes of 0; normalised queries and keys; rotary
positions with base 10,000.

**Notes.** The bias is slope * softplus(projection), which the release has in the place of the
paper's exponential. It does not depend on the query. Choosing once for the whole text would leave
early queries without keys, so each query chooses among the keys up to its own. That makes the
output at a place the same whatever follows. While all slopes are 0 every key ties; ties go to the
latest, so that an untrained layer is a sliding window. The choice has no gradient, the bias has.
With no more keys than `keys` all are attended. The release's optional smoothing over blocks is left
out, and so is its block skipping: our executor reads single keys.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.running import lists_of, running_top
from gossamer.methods.attention.tiles import check_count
from gossamer.nn.attention_gate import rotated
from gossamer.ops.attention import Layout, attention


class DMA(nn.Module):
    """Causal self-attention over the keys of the highest learned bias.

    Parameters
    ----------
    channels : int
        Of input and output.
    heads : int
        Query heads; they divide `channels`.
    kv_heads : int or None
        Heads of keys and values; they divide `heads`. As many as `heads` where None.
    keys : int
        That each query attends at most.
    base : float
        Of the rotary positions.

    References
    ----------
    Trainable Dynamic Mask Sparse Attention (2025).
    """

    card: ClassVar[Card] = Card(
        name="dma",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("unstructured",),
        year=2025,
        link="https://arxiv.org/abs/2508.02124",
        status="experimental",
    )

    def __init__(
        self, channels: int, heads: int, kv_heads: int | None = None, keys: int = 2048,
        base: float = 10000.0,
    ) -> None:  # fmt: skip
        kv_heads = heads if kv_heads is None else kv_heads
        for name, value in (
            ("channels", channels), ("heads", heads), ("kv_heads", kv_heads), ("keys", keys),
        ):  # fmt: skip
            check_count("DMA", name, value)
        if channels % (2 * heads) or heads % kv_heads:
            raise UsageError(
                f"DMA: {channels} channels make no {heads} heads of even width, or {heads} heads "
                f"do not share {kv_heads} of keys"
            )
        super().__init__()
        self.channels, self.heads, self.kv_heads, self.keys = channels, heads, kv_heads, keys
        width = channels // heads
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, kv_heads * width, bias=False)
        self.value = nn.Linear(channels, kv_heads * width, bias=False)
        self.query_norm, self.key_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.importance = nn.Linear(kv_heads * width, kv_heads, bias=False)
        self.slope = nn.Parameter(torch.zeros(kv_heads))
        self.project = nn.Linear(channels, channels, bias=False)
        self.register_buffer("frequencies", base ** (-torch.arange(0, width, 2) / width))
        self.frequencies: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, channels) to the same."""
        if x.dim() != 3 or x.shape[2] != self.channels or not x.shape[1]:
            raise UsageError(f"DMA takes (batch, length, {self.channels}), not {tuple(x.shape)}")
        query = self._rotated(self.query_norm(_split(self.query(x), self.heads)))
        key = self._rotated(self.key_norm(_split(self.key(x), self.kv_heads)))
        value, bias = _split(self.value(x), self.kv_heads), self.bias(x)
        layout = self.layout(bias.detach())
        found, _ = attention(query, key, value, layout, causal=True, key_bias=bias)
        projected: Tensor = self.project(found.transpose(1, 2).flatten(2))
        return projected

    def bias(self, x: Tensor) -> Tensor:
        """What each key's logits gain, (batch, kv_heads, length)."""
        raised = F.softplus(self.importance(self.value(x))).transpose(1, 2)
        return self.slope.unsqueeze(-1) * raised

    def layout(self, bias: Tensor) -> Layout:
        """Of each query, the keys up to its own with the highest biases."""
        length = bias.shape[-1]
        offsets, tokens = lists_of(running_top(bias, self.keys))
        return Layout.empty(length, length).with_tokens(offsets, tokens, 1)

    def _rotated(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[2], device=x.device)
        return rotated(x, places, self.frequencies)


def _split(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * width) as (batch, heads, length, width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
