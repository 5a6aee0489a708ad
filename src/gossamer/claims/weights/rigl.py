"""RigL on the digits: at equal training FLOPs, does sparse-to-sparse match dense-to-sparse?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import qualities, train
from gossamer.testbed.vision import Digits

DENSITY = 0.05


def one(seed: int, short: bool) -> dict[str, float]:
    """GMP for 250 steps; RigL, SET and the static mask for as long as its FLOPs last."""
    steps, updates = (20, 4) if short else (250, 30)
    problem, spent = Digits(seed, norm=True), 0.0

    def watch(run: gs.SparseRun) -> None:
        nonlocal spent
        spent += run.density

    model = problem.build(seed)
    train(
        problem, model, gs.weights.GMP(DENSITY, gs.ERK(), max(1, steps // 40)), steps, watch=watch
    )
    # In a perceptron a step costs its density; a growing step has a dense weight gradient, 1/3.
    longer = round((spent - 0.75 * updates * (1 - DENSITY) / 3) / DENSITY)
    every = max(1, longer // updates)
    methods = {
        "RigL": gs.weights.RigL(DENSITY, every=every),
        "SET": gs.weights.SET(DENSITY, gs.ERK(), every=every),
        "static": gs.weights.StaticRandom(DENSITY),
    }
    return {
        "GMP": problem.quality(model),
        **qualities(problem, methods, longer),
        "steps of the others": float(longer),
    }


def promises(found: Figures) -> list[Promise]:
    """No worse than GMP, better than random growth and than a static mask."""
    return [
        promise("RigL no more than 0.5% below GMP", "quality", found["RigL"], found["GMP"], 0.005),
        promise("RigL above SET", "quality", found["RigL"], found["SET"]),
        promise("RigL above static", "quality", found["RigL"], found["static"]),
    ]


CLAIM = Claim(
    gs.weights.RigL,
    "Training sparse from start to end matches or beats dense-to-sparse training at a fixed cost, "
    "and beats random growth and static masks.",
    "Digits, MLP 64-128-64-10 with BatchNorm at 5%, ERK; GMP 250 steps, the others as many as cost "
    "the same multiply-adds, RigL's dense gradients counted.",
    one,
    promises,
    remark="With BatchNorm at its usual eps of 1e-5 RigL can collapse: rigl_stability.json.",
)
