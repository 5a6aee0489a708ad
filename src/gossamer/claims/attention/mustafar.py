"""Mustafar: entries of keys and values by magnitude, against whole channels, and on SmolLM2-135M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import gossamer as gs
from gossamer.claims.caches import BEHIND, PROMPT, decoded, loaded
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.ops.kv_tiles import pack
from gossamer.ops.select import keep

KEPT = (0.5, 0.3)
HEADS, KEYS, WIDTH = 4, 1024, 64
OPTIONS = {"tail": 32, "every": 64}


@dataclass(frozen=True)
class WholeChannels:
    """The baseline: as many entries, in the channels with the largest norms."""

    density: float
    tail: int = 32
    every: int = 64

    card: ClassVar[gs.Card] = gs.attention.Mustafar.card

    def kept_entries(self, x: Tensor, keys: bool) -> Tensor:
        """bool, the shape of x: alike for all tokens of a head."""
        norms = x.float().square().sum(2, keepdim=True)
        return keep(norms, gs.TopK(round(self.density * x.shape[-1]))).expand(x.shape)


def one(seed: int, short: bool) -> dict[str, float]:
    """Errors and bytes on random keys with loud channels, and bits per token of a model."""
    return {**_random(seed), **_bits(seed, short)}


def _random(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, HEADS, KEYS, WIDTH, generator=generator) for _ in range(3))
    key[..., torch.randperm(WIDTH, generator=generator)[:4]] *= 4
    exact = _attention(query, key, value)
    found = {}
    for kept in KEPT:
        for name, method in _methods(kept).items():
            masks = method.kept_entries(key, True), method.kept_entries(value, False)
            error = _attention(query, key * masks[0], value * masks[1]) - exact
            found[f"error, {name}"] = float(error.norm() / exact.norm())
            if isinstance(method, WholeChannels):
                continue
            both = zip((key.half(), value.half()), masks, (True, False), strict=True)
            held = sum(pack(x, mask, keys=keys).nbytes for x, mask, keys in both)
            found[f"bytes, {name}"] = held / (4 * key.numel())
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def _methods(kept: float) -> dict[str, gs.attention.Mustafar | WholeChannels]:
    return {
        f"mustafar {kept}": gs.attention.Mustafar(kept, **OPTIONS),
        f"whole channels {kept}": WholeChannels(kept, **OPTIONS),
    }


def _bits(seed: int, short: bool) -> dict[str, float]:
    model, ids = loaded(short)
    prompt, behind = (200, 9) if short else (PROMPT, BEHIND)
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(ids) - prompt - behind, (), generator=generator))
    ids = ids[first : first + prompt + behind]
    whole = gs.attention.Mustafar(1.0, **OPTIONS)
    base = gs.attention_cache(model, whole)
    found: dict[str, float] = {}
    with torch.no_grad():
        model(ids[:prompt].unsqueeze(0), past_key_values=base, logits_to_keep=1)
        for name, method in {"dense": whole, **_methods(0.5), **_methods(0.3)}.items():
            own = gs.attention_cache(model, method)
            own.start_from(base)
            found[f"bits, {name}"] = decoded(model, ids[prompt:], own)
    return found


def promises(found: Figures) -> list[Promise]:
    """Small errors, bytes by the card's count, and bits per token near dense."""
    ones = [1.0] * len(found["bits, dense"])
    lines = []
    for kept, most in ((0.5, 0.66), (0.3, 0.47)):
        lines += [
            promise(f"at most {most} of the bytes with {kept} of the entries", "mechanism",
                    [most * x for x in ones], found[f"bytes, mustafar {kept}"]),
            promise(f"less error than whole channels with {kept} of random entries", "quality",
                    found[f"error, whole channels {kept}"], found[f"error, mustafar {kept}"]),
            promise(f"bits per token near dense with {kept} of the entries", "quality",
                    found["bits, dense"], found[f"bits, mustafar {kept}"], 0.1),
            promise(f"fewer bits than whole channels with {kept} of the entries", "quality",
                    found[f"bits, whole channels {kept}"], found[f"bits, mustafar {kept}"]),
        ]  # fmt: skip
    reason = "the figure is of a GPU and 7 billion weights"
    return [*lines, Promise("up to 2.23 times the tokens per second", "quality", reason=reason)]


CLAIM = Claim(
    gs.attention.Mustafar,
    "70% of the entries of the cache dropped without loss of accuracy, 45% of the bytes, and up to "
    "2.23 times the tokens per second.",
    f"Random keys of width {WIDTH} with 4 loud channels, {KEYS} of them: error of the output, and "
    f"bytes against 16 bits an entry. SmolLM2-135M in bfloat16: {PROMPT} tokens of held-out "
    f"documentation as a prompt, pruned by {OPTIONS['every']} up to a dense tail of "
    f"{OPTIONS['tail']}, then {BEHIND - 1} tokens one by one. Bits per token, lower is better. Whole "
    "channels are those with the largest norm in each head.",
    one,
    promises,
    threads=None,
)
