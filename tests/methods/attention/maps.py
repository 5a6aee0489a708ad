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
