"""WGSEF on the digits: is the preset number of neurons there before the cut, at little loss, and
does it beat group lasso with as many neurons left?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from claims.ledger import main, promise, record
from claims.vision import accuracy, mlp, seeded, train
from torch import Tensor

import gossamer as gs
from gossamer.core.step import Step
from gossamer.methods.weights.topology import StaticSupport

COUPLED = (
    gs.Coupled(128, ("1",), (), (), ("3",)),
    gs.Coupled(64, ("3",), (), (), ("5",)),
)
DENSITY = 0.25
LASSO = (1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rate times lambda of the group lasso; the best is chosen in its favour."""


@dataclass(frozen=True)
class GroupLasso(StaticSupport):
    """The proximal step of `strength` times the sum of the groups' norms after each step, and the
    cut of WGSEF at the same step: as many neurons stay, so the FLOPs are the same."""

    strength: float

    card: ClassVar[gs.Card] = gs.weights.WGSEF.card
    cut: ClassVar[gs.weights.WGSEF] = gs.weights.WGSEF(DENSITY, COUPLED)

    def start(self, step: Step) -> dict[str, Tensor]:
        """Every weight."""
        return self.cut.start(step)

    def due(self, step: int, total: int) -> bool:
        """At the cut."""
        return self.cut.due(step, total)

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The groups with the largest norm."""
        return self.cut.update(step)

    def edit_weights(self, step: Step) -> dict[str, Tensor]:
        """Each row of the coupled layers, shorter by the strength, down to zero."""
        if step.number > self.cut.last(step.total):
            return {}
        shrunk = {}
        for x in step.layers[:2]:
            norm = x.weight.norm(dim=1, keepdim=True)
            shrunk[x.name] = x.weight * (1 - self.strength / norm.clamp_min(1e-12)).clamp_min(0)
        return shrunk


def one(method: Any, seed: int, steps: int) -> tuple[float, float]:
    """Accuracy, and what the groups about to be cut hold of all groups' norm, one step before."""
    model = seeded(lambda: mlp(128, 64), seed)
    held: list[float] = []
    cut = int(0.75 * steps)

    def watch(run: gs.SparseRun) -> None:
        if run.step == cut - 1:
            norms = [x.weight.detach().norm(dim=1) for x in run.layers[:2]]
            kept = [n.topk(round(DENSITY * len(n))).values.sum() for n in norms]
            held.append(1 - float(torch.stack(kept).sum()) / float(sum(n.sum() for n in norms)))

    train(model, method, steps, seed, watch=watch, decay=0.0)
    return accuracy(model, seed), held[0]


def check(short: bool = False) -> dict[str, Any]:
    """Five seeds, a quarter of the neurons."""
    seeds, steps = (2, 40) if short else (5, 400)
    dense = []
    for seed in range(seeds):
        model = seeded(lambda: mlp(128, 64), seed)
        train(model, None, steps, seed, decay=0.0)
        dense.append(accuracy(model, seed))
    runs, none = (
        [one(gs.weights.WGSEF(DENSITY, COUPLED, strength), seed, steps) for seed in range(seeds)]
        for strength in (0.1, 1e-8)
    )
    lasso = {s: [one(GroupLasso(s), seed, steps) for seed in range(seeds)] for s in LASSO}
    best = max(LASSO, key=lambda s: sum(accuracy for accuracy, _ in lasso[s]))
    arms = {
        "dense": dense,
        "WGSEF": [r[0] for r in runs],
        "cut without the envelope": [r[0] for r in none],
        "share of norm about to be cut": [r[1] for r in runs],
        "the same without the envelope": [r[1] for r in none],
    }
    for strength, found in lasso.items():
        arms[f"group lasso {strength:g}"] = [r[0] for r in found]
        arms[f"share about to be cut, group lasso {strength:g}"] = [r[1] for r in found]
    return record(
        "wgsef",
        "A sparsity set in advance is reached at convergence, with negligible loss of accuracy, and "
        "more of it is left than by group lasso.",
        f"Digits, MLP 64-128-64-10 to a quarter of the neurons, {steps} steps, cut at three "
        f"quarters, {seeds} seeds.",
        arms,
        [
            promise("less than 1% of the norm is left to cut", [0.01 - r[1] for r in runs]),
            promise("no more than 1% below dense", arms["WGSEF"], dense, 0.01),
            promise("above cutting without it", arms["WGSEF"], arms["cut without the envelope"]),
            promise(
                f"above group lasso ({best:g}) with as many neurons",
                arms["WGSEF"],
                arms[f"group lasso {best:g}"],
            ),
        ],
        remark="Group lasso is cut at the same step to the same number of neurons and trains as "
        "long; the best of its strengths is chosen on the same held-out digits, in its favour, while "
        "WGSEF runs at its default alone.",
    )


if __name__ == "__main__":
    main(check)
