"""Synthetic calls, and what the executor really attends."""

import torch

from gossamer.core.attention import AttentionCall
from gossamer.engine.inputs.attend import run_layout


def normal_call(queries, past=0, heads=2, kv_heads=1, width=8, seed=0, batch=1):
    """A causal call of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, width, generator=generator)
    key, value = (
        torch.randn(batch, kv_heads, queries + past, width, generator=generator) for _ in range(2)
    )
    return AttentionCall(query, key, value, width**-0.5, True)


def attended(layout, call):
    """bool (batch, heads, queries, keys), seen through the executor with uniform weights."""
    eye = torch.eye(call.keys).expand(call.query.shape[0], call.key.shape[1], -1, -1)
    flat = AttentionCall(
        torch.zeros_like(call.query), torch.zeros_like(call.key), eye, 1.0, call.causal
    )
    return run_layout(flat, layout)[0] > 0


def logits_of(call):
    """(batch, heads, queries, keys), scaled, -inf behind the query."""
    key = call.key.repeat_interleave(call.shared, dim=1)
    place = torch.arange(call.keys)
    now = torch.arange(call.queries).unsqueeze(1) + call.past
    logits = call.query @ key.transpose(-1, -2) * call.scale
    return logits.masked_fill(place > now, -torch.inf)


def hot_call(tokens=2048, width=64, columns=40, seed=0):
    """One head with a sink, a band of near keys, and scattered columns that all queries want.

    Most of the attention is theirs; the rest is noise.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key = (0.6 * torch.randn(tokens, width, generator=generator) for _ in range(2))
    wanted = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    query = query + 6 * wanted
    hot = torch.randperm(tokens - 128, generator=generator)[:columns] + 64
    key[hot] += 10 * wanted
    key[0] += 12 * wanted
    # Near keys look like near queries: slow waves shared by both.
    place = torch.arange(tokens).unsqueeze(1) / 24
    phase = torch.rand(width // 2, generator=generator) * 6.28
    speed = torch.rand(width // 2, generator=generator) + 0.5
    wave = torch.cat([torch.cos(place * speed + phase), torch.sin(place * speed + phase)], dim=1)
    query, key = query + 1.2 * wave, key + 1.2 * wave
    value = torch.randn(tokens, width, generator=generator)
    parts = (x.reshape(1, 1, tokens, width) for x in (query, key, value))
    return AttentionCall(*parts, width**-0.5, True), hot
