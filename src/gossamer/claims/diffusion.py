"""Synthetic attention of diffusion models, and measures of it, for several claims."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall

WIDTH = 32


def normal(seed: int, *shape: int) -> Tensor:
    """Normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
    """A call to both sides with the usual scale."""
    return AttentionCall(query, key, value, query.shape[-1] ** -0.5, False)


def drifted(call: AttentionCall, seed: int, amount: float) -> AttentionCall:
    """The same with noise of so many standard deviations of their entries, as at a later step."""
    parts = {}
    for place, name in enumerate(("query", "key", "value")):
        x = getattr(call, name)
        parts[name] = x + amount * x.std() * normal(1000 * seed + 7 + place, *x.shape)
    return replace(call, **parts)


def weights(call: AttentionCall) -> Tensor:
    """Dense attention (batch, heads, queries, keys)."""
    return (call.query @ call.key.mT * call.scale).softmax(-1)


def recall(call: AttentionCall, mask: Tensor) -> float:
    """The share of dense attention in a mask of pairs, over all queries."""
    return float((weights(call) * mask).sum(-1).mean())


def of_blocks(mask: Tensor, block: int) -> Tensor:
    """A mask of pairs from one of tiles."""
    return mask.repeat_interleave(block, -2).repeat_interleave(block, -1)


def off(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of what was wanted."""
    return float((found - wanted).norm() / wanted.norm())


def blocky(seed: int, blocks: int = 32, block: int = 16, heads: int = 4) -> AttentionCall:
    """Each block of queries wants a few blocks of keys, at random, by directions they share.

    Within a block the directions alternate in sign, so that means say less than the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    wants = torch.rand(1, heads, blocks, blocks, generator=generator) < 3 / blocks
    topic = torch.randn(1, heads, blocks, WIDTH, generator=generator)
    topic = 1.6 * topic / topic.square().mean(-1, keepdim=True).sqrt()
    query = wants.float() @ topic / wants.sum(-1, keepdim=True).clamp(min=1).sqrt()
    sign = torch.ones(block)
    sign[::2] = -0.7
    spread = sign.reshape(1, 1, 1, block, 1)
    q, k = (x.unsqueeze(3) * spread for x in (query, topic))
    q, k = (x.flatten(2, 3) for x in (q, k))
    noise = torch.randn(2, *q.shape, generator=generator)
    value = torch.randn(q.shape, generator=generator)
    return call_of(q + 0.5 * noise[0], k + 0.5 * noise[1], value)
