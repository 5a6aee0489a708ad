"""WGSEF on the digits: is the preset number of neurons there before the cut, at little loss?"""

from __future__ import annotations

from typing import Any

import torch
from claims.ledger import main, promise, record
from claims.vision import accuracy, mlp, seeded, train

import gossamer as gs

COUPLED = (
    gs.Coupled(128, ("1",), (), (), ("3",)),
    gs.Coupled(64, ("3",), (), (), ("5",)),
)
DENSITY = 0.25


def one(strength: float, seed: int, steps: int) -> tuple[float, float]:
    """Accuracy, and what the groups about to be cut hold of all groups' norm, one step before."""
    model = seeded(lambda: mlp(128, 64), seed)
    held: list[float] = []
    cut = int(0.75 * steps)

    def watch(run: gs.SparseRun) -> None:
        if run.step == cut - 1:
            norms = [x.weight.detach().norm(dim=1) for x in run.layers[:2]]
            kept = [n.topk(round(DENSITY * len(n))).values.sum() for n in norms]
            held.append(1 - float(torch.stack(kept).sum()) / float(sum(n.sum() for n in norms)))

    train(model, gs.WGSEF(DENSITY, COUPLED, strength), steps, seed, watch=watch, decay=0.0)
    return accuracy(model, seed), held[0]


def check(short: bool = False) -> dict[str, Any]:
    """Five seeds, a quarter of the neurons."""
    seeds, steps = (2, 40) if short else (5, 400)
    dense = []
    for seed in range(seeds):
        model = seeded(lambda: mlp(128, 64), seed)
        train(model, None, steps, seed, decay=0.0)
        dense.append(accuracy(model, seed))
    runs = [one(0.01, seed, steps) for seed in range(seeds)]
    none = [one(1e-9, seed, steps) for seed in range(seeds)]
    arms = {
        "dense": dense,
        "WGSEF": [r[0] for r in runs],
        "cut without the envelope": [r[0] for r in none],
        "share of norm about to be cut": [r[1] for r in runs],
        "the same without the envelope": [r[1] for r in none],
    }
    return record(
        "wgsef",
        "A sparsity set in advance is reached at convergence, with negligible loss of accuracy.",
        f"Digits, MLP 64-128-64-10 to a quarter of the neurons, {steps} steps, cut at three "
        f"quarters, {seeds} seeds.",
        arms,
        [
            promise("less than 1% of the norm is left to cut", [0.01 - r[1] for r in runs]),
            promise("no more than 1% below dense", arms["WGSEF"], dense, 0.01),
            promise("above cutting without it", arms["WGSEF"], arms["cut without the envelope"]),
        ],
    )


if __name__ == "__main__":
    main(check)
