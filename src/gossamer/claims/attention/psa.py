"""PSA on keys that change slowly, and on noise: what pooling keeps with the bias and without."""

from __future__ import annotations

from dataclasses import replace

import torch

import gossamer as gs
from gossamer.claims.diffusion import WIDTH, call_of, normal, off
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.core.attention import AttentionCall
from gossamer.methods.attention.psa import pyramid
from gossamer.methods.attention.tiles import pooled
from gossamer.ops.attention import Layout, attention, merge

BLOCK = 32


def smooth(seed: int, tokens: int) -> AttentionCall:
    """Keys and values on lines between knots 64 tokens apart."""
    at = torch.arange(tokens) / 64
    left = at.long()
    share = (at - left).unsqueeze(-1)
    query, *knots = (normal(5 * seed + i, 1, 2, n, WIDTH)
                     for i, n in enumerate((tokens, tokens // 64 + 2, tokens // 64 + 2)))  # fmt: skip
    key, value = (2 * ((1 - share) * x[:, :, left] + share * x[:, :, left + 1]) for x in knots)
    return call_of(query, key, value)


def noisy(seed: int, tokens: int) -> AttentionCall:
    """Sharp attention, and neighbours that have nothing in common."""
    query, key, value = (normal(5 * seed + i, 1, 2, tokens, WIDTH) for i in range(3))
    return call_of(query, 4 * key, value)


def without_bias(call: AttentionCall, levels: torch.Tensor) -> torch.Tensor:
    """Levels 1 and 8, a mean counted as one key."""
    whole = Layout.from_blocks(levels == 1, call.queries, call.keys, BLOCK, BLOCK)
    key, value = pooled(call.key, 8), pooled(call.value, 8)
    means = Layout.from_blocks(levels == 8, call.queries, key.shape[2], BLOCK, BLOCK // 8)
    one = attention(call.query, call.key, call.value, whole, scale=call.scale)
    return merge(one, attention(call.query, key, value, means, scale=call.scale))[0]


def one(seed: int, short: bool) -> dict[str, float]:
    """Errors with every second block over means of 8, or left out."""
    tokens, found = 256 if short else 512, {}
    for name, call in (("smooth", smooth(seed, tokens)), ("noise", noisy(seed, tokens))):
        wanted = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
        levels = torch.ones(1, 2, tokens // BLOCK, tokens // BLOCK, dtype=torch.int64)
        levels[..., ::2] = 8
        (output, _), pairs = pyramid(call, levels, BLOCK, BLOCK)
        skipped = pyramid(call, levels * (levels == 1), BLOCK, BLOCK)[0][0]
        found[f"error, {name}, means with bias"] = off(output, wanted)
        found[f"error, {name}, means without bias"] = off(without_bias(call, levels), wanted)
        found[f"error, {name}, left out"] = off(skipped, wanted)
    return found | {"density": pairs / (2 * tokens**2)} | ranked(smooth(seed + 1000, tokens))


def ranked(call: AttentionCall) -> dict[str, float]:
    """The pyramid by rank, and as many pairs in whole blocks alone."""
    method = gs.attention.PSA(rows=BLOCK, block=BLOCK, tile=BLOCK, first=0.0)
    step = gs.DenoisingStep(9, 10)
    levels = method.choose(call, step)
    wanted = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
    (output, _), pairs = pyramid(call, levels, BLOCK, BLOCK)
    share = pairs / (call.query.shape[1] * call.queries * call.keys)
    blocks = replace(method, shares=(share, share, share, share))
    whole, whole_pairs = pyramid(call, blocks.choose(call, step), BLOCK, BLOCK)
    return {
        "error, pyramid by rank": off(output, wanted),
        "error, whole blocks by rank": off(whole[0], wanted),
        "pairs, pyramid over whole blocks": pairs / whole_pairs,
    }


def promises(found: Figures) -> list[Promise]:
    """The bias is what makes pooling work, where neighbours are alike."""
    good = found["error, smooth, means with bias"]
    return [
        promise("less than a tenth of the error without the bias", "mechanism",
                found["error, smooth, means without bias"], [10 * x for x in good]),
        promise("less than a tenth of the error of leaving out", "quality",
                found["error, smooth, left out"], [10 * x for x in good]),
        promise("on sharp noise pooling gains less than 5%", "mechanism",
                found["error, noise, means with bias"],
                [0.95 * x for x in found["error, noise, left out"]]),
        promise("at about equal pairs the pyramid has less error than whole blocks", "quality",
                found["error, whole blocks by rank"], found["error, pyramid by rank"]),
        Promise("VBench 0.826 at 85% sparsity", "quality", reason="no CogVideoX-5B here"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.PSA,
    "Means of keys at several resolutions keep quality at 85% sparsity: VBench 0.826 against 0.819 "
    "dense.",
    "512 tokens of 2 heads, every second block of 32 over means of 8; and the method's own ranking "
    "on smooth keys.",
    one,
    promises,
)
