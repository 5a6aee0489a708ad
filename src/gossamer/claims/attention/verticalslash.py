"""Vertical-Slash on SmolLM2-135M and on symbols: recall at equal density, and accuracy kept."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.prompts import SYMBOLS, WHERE, at, curve, symbol_scores

DENSITIES = (0.3,)


def one(seed: int, short: bool) -> dict[str, float]:
    """Recall beside a fixed window, and needles on symbols."""
    found: dict[str, float] = {}
    for name in ("verticalslash", "streamingllm"):
        known = curve(seed, short, name)
        found |= {f"recall, {name} at {density:g}": at(known, density) for density in DENSITIES}
    names = ("verticalslash", "streamingllm")
    return found | symbol_scores(names, seed, short, ("needle",), (0.3,))


def promises(found: Figures) -> list[Promise]:
    """Above the static pattern, and near dense."""
    lines = [
        promise(f"recall above streamingllm at density {density:g}", "quality",
                found[f"recall, verticalslash at {density:g}"],
                found[f"recall, streamingllm at {density:g}"])
        for density in DENSITIES
    ]  # fmt: skip
    needle = found["needle, verticalslash at 0.3"]
    return [
        *lines,
        promise("needles at density 0.3 as often as dense", "quality", needle,
                found["needle, dense"], 0.05),
        promise("needles at density 0.3 more often than streamingllm", "quality", needle,
                found["needle, streamingllm at 0.3"]),
        Promise("10 times faster prefill at a million tokens", "quality",
                reason="no model here reads more than 8192 tokens, and the figure is of a GPU"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.VerticalSlash,
    "Up to 10 times faster prefill at a million tokens with the accuracy kept, above static patterns.",
    f"{WHERE} {SYMBOLS} Tiles of 16, the last 64 queries, the nearest 16 offsets fixed.",
    one,
    promises,
    remark="The paper searches a pattern for each head; here every head has this one, as in The "
    "Sparse Frontier.",
    threads=None,
)
