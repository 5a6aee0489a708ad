"""The Sparse Frontier's findings with Block-Sparse: which tasks survive low densities?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.prompts import SYMBOLS, figures, symbol_scores
from gossamer.testbed.maps import hot_call

TASKS = ("needle", "counting", "multi-hop")
DENSITIES = (0.15, 0.3, 0.6)


def one(seed: int, short: bool) -> dict[str, float]:
    """Scores by task and density, and recall on the map of hot columns."""
    found = symbol_scores(("blocksparse",), seed, short, TASKS, DENSITIES)
    hot = [hot_call(512 if short else 2048, seed=seed)[0]]
    for asked in (0.21, 0.31, 0.73):
        density, recall = figures(hot, gs.attention.BlockSparse(block=64, density=asked))
        found |= {f"map: density, asked {asked:g}": density, f"map: recall at {asked:g}": recall}
    return found


def promises(found: Figures) -> list[Promise]:
    """Needles outlast counting and multi-hop, and density is at most what was asked."""

    def kept(task: str, density: float) -> list[float]:
        both = zip(
            found[f"{task}, blocksparse at {density:g}"], found[f"{task}, dense"], strict=True
        )
        return [sparse / max(dense, 1e-9) for sparse, dense in both]

    lines = [
        promise(f"at density {density:g} needles keep more of their dense score than {task}",
                "quality", kept("needle", density), kept(task, density))
        for task in ("counting", "multi-hop") for density in (0.15, 0.3)
    ]  # fmt: skip
    for asked, recall in ((0.21, 0.59), (0.31, 0.70), (0.73, 0.94)):
        lines.append(promise(
            f"on the map of hot columns, recall within 0.15 of {recall:g} at density {asked:g}",
            "mechanism", [0.15 - abs(x - recall) for x in found[f"map: recall at {asked:g}"]],
        ))  # fmt: skip
        lines.append(promise(
            f"on the map, no more than the density asked, {asked:g}", "mechanism",
            [asked + 1e-9 - x for x in found[f"map: density, asked {asked:g}"]],
        ))  # fmt: skip
    return [
        *lines,
        Promise("a large sparse model beats a small dense one at equal operations", "quality",
                reason="it takes two models of one family that solve such tasks, and prompts at "
                "which attention outweighs their linear layers; one model here solves them"),
        Promise("at 128k tokens densities of 0.07 to 0.2 lie on the Pareto front", "quality",
                reason="no model here reads more than 8192 tokens"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.BlockSparse,
    "At long inputs the best sparse configurations of larger models lie on the Pareto front of "
    "quality over cost. What density a task bears differs from task to task.",
    f"{SYMBOLS} Blocks of 16, between settings on a logarithmic scale. The map has 2048 tokens, a "
    "sink, a band and 40 hot columns, drawn anew for each seed, in blocks of 64.",
    one,
    promises,
)
