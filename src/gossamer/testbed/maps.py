"""A synthetic attention map, on which block-wise choices fail."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall


def hot_call(
    tokens: int = 2048, width: int = 64, columns: int = 40, seed: int = 0
) -> tuple[AttentionCall, Tensor]:
    """One head with a sink, a band of near keys, and scattered columns that all queries want.

    Most of the attention is theirs; the rest is noise. Also returns the columns' places.
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
    query, key, value = (x.reshape(1, 1, tokens, width) for x in (query, key, value))
    return AttentionCall(query, key, value, width**-0.5, True), hot
