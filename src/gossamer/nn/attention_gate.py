"""A gate that guesses which blocks of keys a block of queries attends, from pooled features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class BlockGate(nn.Module):
    """Products of projected block features, one projection for each head, with rotary positions.

    Parameters
    ----------
    heads, kv_heads : int
        Query heads, and heads of keys that neighbouring ones share.
    width : int
        Of the heads of queries and keys.
    gate_width : int
        Of the projections; even.
    generator : torch.Generator
        For the first weights.
    base : float
        Of the rotation at the blocks' first positions.
    """

    def __init__(
        self, heads: int, kv_heads: int, width: int, gate_width: int,
        generator: torch.Generator, base: float = 10000.0,
    ) -> None:  # fmt: skip
        super().__init__()
        query = torch.randn(heads, width, gate_width, generator=generator)
        key = torch.randn(kv_heads, 3 * width, gate_width, generator=generator)
        self.query = nn.Parameter(query / math.sqrt(width))
        self.key = nn.Parameter(key / math.sqrt(3 * width))
        steps = torch.arange(0, gate_width, 2) / gate_width
        self.register_buffer("frequencies", base**-steps)
        self.frequencies: Tensor

    def forward(self, query: Tensor, key: Tensor, block: int, past: int = 0) -> Tensor:
        """Logits (batch, heads, query blocks, key blocks), not masked.

        query: (batch, heads, query blocks, width), means; key: (batch, kv_heads, key blocks,
        3 width), as `key_features` gives them; both before the model's own rotation.
        """
        q, k = query @ self.query, key @ self.key
        q = rotated(q, torch.arange(q.shape[2], device=q.device) * block + past, self.frequencies)
        k = rotated(k, torch.arange(k.shape[2], device=k.device) * block, self.frequencies)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def key_features(key: Tensor, block: int) -> Tensor:
    """Maximum, minimum and mean of each block, float32 (batch, kv_heads, blocks, 3 width).

    A short last block counts the tokens it has.
    """
    parts = []
    for piece in key.float().split(block, dim=2):
        parts.append(torch.cat([piece.amax(2), piece.amin(2), piece.mean(2)], dim=-1))
    return torch.stack(parts, dim=2)


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary positions in halves, over the first 2 * len(frequencies) entries of the last axis.

    Negative frequencies undo it.
    """
    size = 2 * frequencies.numel()
    angles = positions.to(frequencies.dtype).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :size].chunk(2, dim=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, x[..., size:]], dim=-1)
