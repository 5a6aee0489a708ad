"""AnchorAttention: recall at equal density on SmolLM2-135M, and the card's map of hot columns."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.prompts import CURVES, WHERE, at, curve, figures, language_calls
from gossamer.testbed.maps import hot_call

RIVALS = ("blocksparse", "verticalslash", "flexprefill")
SETTING = CURVES["anchorattention"][2]


def one(seed: int, short: bool) -> dict[str, float]:
    """Recall of each method at AnchorAttention's density, on text and on the synthetic map."""
    called = language_calls(seed, short)
    density, recall = figures(called, SETTING)
    found = {"density": density, "recall": recall}
    found |= {f"recall, {name}": at(curve(seed, short, name), density) for name in RIVALS}
    hot = [hot_call(512 if short else 2048, seed=seed)[0]]
    anchor = gs.attention.AnchorAttention(6, step=4, block=64)
    density, recall = figures(hot, anchor)
    blocks = [figures(hot, gs.attention.BlockSparse(block=64, density=d)) for d in (0.21, 0.31)]
    found |= {"map: density": density, "map: recall": recall}
    found["map: recall, blocksparse"] = at(blocks, density)
    return found


def promises(found: Figures) -> list[Promise]:
    """Above each at equal density, and what the card measured."""
    lines = [
        promise(f"recall above {name} at equal density", "quality",
                found["recall"], found[f"recall, {name}"])
        for name in RIVALS
    ]  # fmt: skip
    off = [abs(density - 0.25) for density in found["map: density"]]
    return [
        *lines,
        promise("on the map of hot columns, recall at least 0.2 above mean-pooled blocks at equal "
                "density", "mechanism", [x - 0.2 for x in found["map: recall"]],
                found["map: recall, blocksparse"]),
        promise("on the map, density within 0.02 of 0.25 at theta 6", "mechanism",
                [0.02 - x for x in off]),
        promise("on the map, recall at least 0.96 at theta 6", "mechanism", found["map: recall"], 0.96),
        Promise("1.44 times faster at 128k tokens", "quality",
                reason="no model here reads more than 8192 tokens, and the figure is of a GPU"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.AnchorAttention,
    "Higher recall than the best method before it at equal density, and 1.44 times its speed at 128k "
    "tokens.",
    f"{WHERE} Blocks of 16 and groups of 4, theta 2; others at the same density, between their "
    "settings. The map has 2048 tokens, a sink, a band and 40 hot columns, drawn anew for each seed.",
    one,
    promises,
    remark="Prompts of 512 tokens are short for this method: the first block and the window are a "
    "large part of its density, and the last 64 queries, from which the two others choose for all, "
    "are an eighth of the prompt.",
    threads=None,
)
