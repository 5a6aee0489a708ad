"""Double Sparsity: planted loud channels, flat ones, and SmolLM2-135M."""

from __future__ import annotations

import torch

import gossamer as gs
from gossamer.claims.caches import WHERE, bits
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.core.attention import AttentionCall

KEYS, WIDTH, LOUD, READ = 4096, 64, 4, 256


def kept(seed: int, loud: bool, keys: int = KEYS) -> dict[str, float]:
    """Attention of one query on the keys chosen, by what chose them; 4 channels of 64 are loud."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.ones(WIDTH)
    if loud:
        strength[torch.randperm(WIDTH, generator=generator)[:LOUD]] = 4.0
    key = torch.randn(1, 1, keys, WIDTH, generator=generator) * strength
    query = torch.randn(1, 1, keys + 1, WIDTH, generator=generator)
    call = AttentionCall(query[:, :, 1:], key, key, WIDTH**-0.5, True)
    method = gs.attention.DoubleSparsity(READ, factor=WIDTH // LOUD, bits=16, dense=0)
    found = method.fitted({0: [method.observe(call)]})
    other = torch.randperm(WIDTH, generator=generator)[:LOUD].sort().values
    arbitrary = gs.attention.DoubleSparsity(
        READ, factor=WIDTH // LOUD, bits=16, dense=0, channels={0: other.unsqueeze(0)}
    )
    now = query[:, :, :1]
    dense = (now @ key.transpose(2, 3) * WIDTH**-0.5).softmax(-1)[:, :, 0]
    scores = {"oracle": dense, "first keys": -torch.arange(keys).float().expand(1, 1, -1)}
    for name, each in (("calibrated", found), ("arbitrary", arbitrary)):
        scores[name] = each.score(now, each.summarise(key.unsqueeze(3), 0), 0)
    budget = gs.TopK(READ * keys // KEYS)
    return {name: float(dense[gs.keep(s, budget)].sum()) for name, s in scores.items()}


def one(seed: int, short: bool) -> dict[str, float]:
    """Attention kept on planted keys, and bits per token of a model."""
    found: dict[str, float] = {}
    for kind, loud in (("loud", True), ("flat", False)):
        mass = [kept(20 * seed + i, loud, 512 if short else KEYS) for i in range(20)]
        for name in mass[0]:
            found[f"{kind}: {name}"] = sum(m[name] for m in mass) / len(mass)
    read = bits(seed, short)
    return found | {name: read[name] for name in ("dense", "doublesparsity", "streamingllm")}


def promises(found: Figures) -> list[Promise]:
    """Calibration finds loud channels, gains nothing where there are none, and serves a model."""
    calibrated, arbitrary = found["loud: calibrated"], found["loud: arbitrary"]
    gain = [a - b for a, b in zip(found["flat: calibrated"], found["flat: arbitrary"], strict=True)]
    return [
        promise("twice the attention of arbitrary channels, where 4 are loud", "mechanism",
                calibrated, [2 * x for x in arbitrary]),
        promise("two thirds of what the best keys hold", "mechanism", calibrated,
                [2 / 3 * x for x in found["loud: oracle"]]),
        promise("no gain above 0.02 on flat channels", "mechanism", [0.02] * len(gain), gain),
        promise("bits per token near dense", "quality", found["dense"], found["doublesparsity"],
                0.1),
        promise("fewer bits than a window with first keys", "quality", found["streamingllm"],
                found["doublesparsity"]),
        Promise("14.1 times faster attention", "quality",
                reason="the figure is of a GPU and of models of 7 billion parameters and more"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.DoubleSparsity,
    "A sixteenth of the channels and of the keys is enough: up to 14.1 times faster attention and "
    "1.9 times faster decoding.",
    f"{KEYS} planted keys of width {WIDTH}, {LOUD} channels loud by a factor of 4 or none, labels "
    f"of {LOUD} channels, {READ} keys read. {WHERE} A quarter of the channels in 4 bits; the first "
    "two layers dense.",
    one,
    promises,
    threads=None,
)
