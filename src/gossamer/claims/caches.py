"""One prefill of SmolLM2-135M from which every cache method decodes, for their claims."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.claims.language import subject
from gossamer.core.attention import CachedKeys
from gossamer.testbed import calibration_text, heldout_text, language_model

PROMPT, BEHIND, TOKENS = 448, 17, 112
"""Tokens of the prompt, tokens read one by one behind it, and keys that a head keeps or reads."""
PAGE = 4
"""Keys of Quest's pages: as many pages in the budget as the paper has, in a shorter text."""
OPTIONS = {"last": 64, "sinks": 4, "window": 16, "kernel": 7}
WHERE = (
    f"SmolLM2-135M in bfloat16: {PROMPT} tokens of held-out documentation as a prompt, another "
    f"window for each seed, then {BEHIND - 1} tokens one by one. Methods keep or read {TOKENS} keys "
    "of a head, and start from the same dense prefill. Bits per token, lower is better."
)


@dataclass(frozen=True)
class RandomKeys:
    """First and last keys as SnapKV fixes them here, and random ones."""

    tokens: int
    seed: int = 0
    last: int = 0

    card: ClassVar[gs.Card] = gs.attention.SnapKV.card

    def kept_keys(self, cached: CachedKeys) -> Tensor:
        """bool (kv_heads, rows)."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * cached.layer)
        place = cached.positions
        always = (place < OPTIONS["sinks"]) | (place >= cached.length - OPTIONS["window"])
        scores = torch.rand(place.shape, generator=generator)
        return gs.keep(scores, gs.TopK(self.tokens), always=always)


@cache
def loaded(short: bool) -> tuple[Any, Tensor]:
    """The model and the tokens of the held-out text; the bundled byte-level one when short."""
    text = heldout_text()
    if short:
        return language_model(), torch.tensor(list(text[:8_000]))
    on = subject(torch.bfloat16)
    return on.model, on.ids(text)


@cache
def calibrated(short: bool) -> gs.attention.DoubleSparsity:
    """Channels from 8 texts of 512 tokens that the held-out text does not hold."""
    model, _ = loaded(short)
    text = calibration_text()[: 4_000 if short else 60_000]
    ids = torch.tensor(list(text)) if short else subject(torch.bfloat16).ids(text)
    data = [ids[i * 512 : (i + 1) * 512].unsqueeze(0) for i in range(2 if short else 8)]
    dense = 1 if short else 2
    found: gs.attention.DoubleSparsity = gs.calibrate_attention(
        model, gs.attention.DoubleSparsity(TOKENS, dense=dense), data
    )
    return found


@cache
def bits(seed: int, short: bool) -> dict[str, float]:
    """Bits per token by method, all of them, and the share of a dense cache that each holds."""
    model, ids = loaded(short)
    prompt, behind = (200, 9) if short else (PROMPT, BEHIND)
    first = int(torch.randint(len(ids) - prompt - behind, (), generator=_generator(seed)))
    ids = ids[first : first + prompt + behind]
    methods: dict[str, Any] = {
        "dense": gs.attention.Quest(10**6),
        "snapkv": gs.attention.SnapKV(TOKENS, **OPTIONS),
        "adasnapkv": gs.attention.AdaSnapKV(TOKENS, **OPTIONS),
        "streamingllm": gs.attention.StreamingLLM(TOKENS - OPTIONS["sinks"]),
        "random keys": RandomKeys(TOKENS, seed),
        "quest": gs.attention.Quest(TOKENS, page=PAGE),
        "doublesparsity": calibrated(short),
    }
    base = gs.attention_cache(model, methods["snapkv"])
    found: dict[str, float] = {}
    with torch.no_grad():
        model(ids[:prompt].unsqueeze(0), past_key_values=base, logits_to_keep=1)
        for name, method in methods.items():
            own = gs.attention_cache(model, method)
            own.start_from(base)
            found[name] = decoded(model, ids[prompt:], own)
            layer = own.result.layers[-1]
            found[f"{name}, keys held"] = layer.rows - (behind - 1)
            found[f"{name}, keys read"] = (layer.density or 0) * (prompt + behind / 2)
    return found


def decoded(model: nn.Module, ids: Tensor, own: Any) -> float:
    """Bits per token of all but the first, each given alone."""
    total = 0.0
    for now, target in pairwise(ids):
        logits = model(now.reshape(1, 1), past_key_values=own).logits[0, -1]
        total += float(nn.functional.cross_entropy(logits.float(), target))
    return total / math.log(2) / (len(ids) - 1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
