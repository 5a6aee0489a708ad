"""WGSEF on the digits: is the preset number of neurons there before the cut, at little loss, and
does it beat group lasso with as many neurons left?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import train
from gossamer.core.step import Step
from gossamer.methods.weights.topology import StaticSupport
from gossamer.testbed.vision import Digits

COUPLED = (
    gs.Coupled(128, ("1",), (), (), ("3",)),
    gs.Coupled(64, ("3",), (), (), ("5",)),
)
DENSITY = 0.25
STRENGTHS = (1e-3, 1e-2, 1e-1)
"""Of the envelope; the last is the default."""
LASSO = (1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rate times lambda of the group lasso."""


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


def measure(method: Any, problem: Digits, steps: int) -> tuple[float, float]:
    """Accuracy, and what the groups about to be cut hold of all groups' norm, one step before."""
    model, cut = problem.build(problem.split), int(0.75 * steps)
    held = 0.0

    def watch(run: gs.SparseRun) -> None:
        nonlocal held
        if run.step == cut - 1:
            norms = [x.weight.detach().norm(dim=1) for x in run.layers[:2]]
            kept = [n.topk(round(DENSITY * len(n))).values.sum() for n in norms]
            held = 1 - float(torch.stack(kept).sum()) / float(sum(n.sum() for n in norms))

    train(problem, model, method, steps, watch=watch, decay=0.0)
    return problem.quality(model), held


def one(seed: int, short: bool) -> dict[str, float]:
    """Dense, both with several strengths, and the cut alone, to a quarter of the neurons."""
    steps, problem = 40 if short else 400, Digits(seed)
    dense = problem.build(seed)
    train(problem, dense, None, steps, decay=0.0)
    found = {"dense": problem.quality(dense)}
    methods: dict[str, Any] = {
        f"WGSEF {s:g}": gs.weights.WGSEF(DENSITY, COUPLED, s) for s in STRENGTHS
    }
    methods |= {f"group lasso {s:g}": GroupLasso(s) for s in LASSO}
    methods["cut alone"] = gs.weights.WGSEF(DENSITY, COUPLED, 1e-8)
    for name, method in methods.items():
        found[name], found[f"share about to be cut, {name}"] = measure(method, problem, steps)
    return found


def promises(found: Figures) -> list[Promise]:
    """What is left to cut, and the accuracy of the best strengths."""
    mine, lasso = (
        max((f"{name} {s:g}" for s in grid), key=lambda key: sum(found[key]))
        for name, grid in (("WGSEF", STRENGTHS), ("group lasso", LASSO))
    )
    steady = f"share about to be cut, WGSEF {STRENGTHS[-1]:g}"
    return [
        promise(
            f"less than 1% of the norm is left to cut at the default, {STRENGTHS[-1]:g}",
            "mechanism",
            [0.01 - x for x in found[steady]],
        ),
        promise(
            f"{mine} no more than 1% below dense", "quality", found[mine], found["dense"], 0.01
        ),
        promise(f"{mine} above the cut alone", "quality", found[mine], found["cut alone"]),
        promise(f"{mine} above {lasso}", "quality", found[mine], found[lasso]),
    ]


CLAIM = Claim(
    gs.weights.WGSEF,
    "A sparsity set in advance is reached at convergence, with negligible loss of accuracy, and "
    "more of it is left than by group lasso.",
    "Digits, MLP 64-128-64-10 to a quarter of the neurons, 400 steps, cut at three quarters.",
    one,
    promises,
    remark="Group lasso is cut at the same step to the same number of neurons and trains as long. "
    "Of both the best strength is chosen on the same held-out digits.",
)
