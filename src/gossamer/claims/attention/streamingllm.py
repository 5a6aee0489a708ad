"""StreamingLLM on SmolLM2-135M: what the first keys are worth, and whether length harms."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.prompts import language, window

WINDOW = 128


@torch.no_grad()
def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per token of one text, dense and within a window, with 4 first keys and with none."""
    ids = window(seed, short, 1024)
    found: dict[str, float] = {}
    for name, sinks in (("dense", None), ("with sinks", 4), ("without sinks", 0)):
        loss = _bits(ids, sinks, short)
        second, last = loss.chunk(4)[1], loss.chunk(4)[3]
        found |= {name: float(loss.mean()), f"{name}, second quarter": float(second.mean()),
                  f"{name}, last quarter": float(last.mean())}  # fmt: skip
    return found


def _bits(ids: Tensor, sinks: int | None, short: bool) -> Tensor:
    """Of each token after the first."""
    model = language(short)
    if sinks is None:
        logits = model(ids[:, :-1], use_cache=False).logits[0]
    else:
        method = gs.attention.StreamingLLM(WINDOW // 4 if short else WINDOW, sinks, block=16)
        with gs.sparse_attention(model, method, dense_below=0):
            logits = model(ids[:, :-1], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none") / math.log(2)


def promises(found: Figures) -> list[Promise]:
    """Sinks prevent a collapse, and what a window costs does not grow with the text."""

    def excess(part: str) -> list[float]:
        both = zip(found[f"with sinks, {part}"], found[f"dense, {part}"], strict=True)
        return [windowed - dense for windowed, dense in both]

    missing = "no model here reads more than 8192 tokens"
    return [
        promise(
            "fewer bits with 4 first keys than with none", "quality",
            found["without sinks"], found["with sinks"],
        ),
        promise(
            "without first keys, over 1 bit per token more than with 4", "quality",
            [x - 1 for x in found["without sinks"]], found["with sinks"],
        ),
        promise(
            "with 4 first keys, at most 0.25 bits per token above dense", "quality",
            found["dense"], found["with sinks"], 0.25,
        ),
        promise(
            "the loss over dense is no larger in the last quarter than in the second", "quality",
            excess("second quarter"), excess("last quarter"), 0.1,
        ),
        Promise("stable over millions of tokens", "quality", reason=missing),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.StreamingLLM,
    "With 4 first keys kept, windowed attention stays stable over millions of tokens; without them "
    "quality collapses.",
    f"SmolLM2-135M in bfloat16 on windows of 1024 tokens of held-out documentation, one for each "
    f"seed, attended within {WINDOW} tokens. Bits per token, lower is better.",
    one,
    promises,
    threads=None,
)
