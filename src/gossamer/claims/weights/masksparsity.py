"""MaskSparsity on the digits: against an L1 pull on every scale, are the kept scales larger, is the
cut harmless, and is the outcome no worse?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import train
from gossamer.testbed.vision import Digits

DENSITY, UNTIL = 0.5, 0.75
PENALTIES = (0.003, 0.01, 0.03, 0.1)
STRONG = 0.03
"""Where marked scales vanish within the run: the mechanism is looked at here."""
NORMS = (2, 5)
COUPLED = (
    gs.Coupled(64, ("1",), ("2",), (), ("4",)),
    gs.Coupled(32, ("4",), ("5",), (), ("7",)),
)


def targeted(problem: Digits, model: Any, penalty: float, steps: int) -> dict[str, float]:
    """MaskSparsity from the trained network; it pulls the smaller half of the scales."""
    start = scales(model)
    kept = start >= start.sort(descending=True).values[round(DENSITY * len(start)) - 1]
    cut, seen = int(UNTIL * steps), {}

    def watch(run: gs.SparseRun) -> None:
        if run.step == cut - 1:
            seen.update(summary(problem, model, kept))
        if run.step == cut:
            seen["lost at the cut"] -= problem.quality(model)

    marks = dict(zip(map(str, NORMS), kept.split([len(model[i].weight) for i in NORMS])))
    method = gs.weights.MaskSparsity(DENSITY, COUPLED, penalty=penalty, until=UNTIL, masks=marks)
    train(problem, model, method, steps, watch=watch, decay=0.0)
    return {"accuracy": problem.quality(model), **seen}


def everywhere(problem: Digits, model: Any, penalty: float, steps: int) -> dict[str, float]:
    """L1 on all scales, then a cut of those that ended smaller, and the rest of the run: the
    paper's baseline. Penalty 0 is a cut by the scales of ordinary training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2
    )
    cut, seen = int(UNTIL * steps), {}
    kept: Tensor | None = None
    for step in range(steps):
        if step == cut:
            order = scales(model).argsort(descending=True)
            kept = torch.zeros(len(order), dtype=torch.bool)
            kept[order[: round(DENSITY * len(order))]] = True
            seen = summary(problem, model, kept)
            zero_scales(model, kept)
            seen["lost at the cut"] -= problem.quality(model)
        optimizer.zero_grad()
        pull = sum(model[i].weight.abs().sum() for i in NORMS) if kept is None else 0.0
        (problem.loss(model, step, problem.split) + penalty * pull).backward()
        optimizer.step()
        rate.step()
        if kept is not None:
            zero_scales(model, kept)
    return {"accuracy": problem.quality(model), **seen}


def scales(model: Any) -> Tensor:
    """|scale| of every channel of both batch norms."""
    return torch.cat([model[i].weight.detach().abs() for i in NORMS])


def zero_scales(model: Any, kept: Tensor) -> None:
    """Set the scales that are not kept to zero."""
    parts = kept.split([len(model[i].weight) for i in NORMS])
    with torch.no_grad():
        for index, part in zip(NORMS, parts):
            model[index].weight.mul_(part)


def summary(problem: Digits, model: nn.Module, kept: Tensor) -> dict[str, float]:
    """Scales before the cut, and the accuracy from which that after the cut is to be taken."""
    size = scales(model)
    return {
        "kept scale": float(size[kept].mean()),
        "marked scale": float(size[~kept].mean()),
        "lost at the cut": problem.quality(model),
    }


def one(seed: int, short: bool) -> dict[str, float]:
    """Both ways at every penalty from the same trained network."""
    steps, problem = 30 if short else 200, Digits(seed, (64, 32), norm=True)
    trained = problem.build(seed)
    train(problem, trained, None, steps)
    start = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    found: dict[str, float] = {}
    runs = [("MaskSparsity", targeted, p) for p in PENALTIES]
    runs += [("L1 on all", everywhere, p) for p in (0.0, *PENALTIES)]
    for name, way, penalty in runs:
        trained.load_state_dict(start)
        seen = way(problem, trained, penalty, steps)
        wanted = seen if penalty == STRONG else ("accuracy",)
        found |= {f"{what}, {name} {penalty:g}": seen[what] for what in wanted}
    return found


def best(found: Figures, name: str, penalties: tuple[float, ...]) -> str:
    """The figure of the penalty with the highest accuracy."""
    return max((f"accuracy, {name} {p:g}" for p in penalties), key=lambda key: sum(found[key]))


def promises(found: Mapping[str, Any]) -> list[Promise]:
    """What the pull does to the scales and to the cut, and the outcome at the best penalties."""
    mine, plain = f"MaskSparsity {STRONG:g}", f"L1 on all {STRONG:g}"
    ours, theirs = best(found, "MaskSparsity", PENALTIES), best(found, "L1 on all", PENALTIES)
    return [
        promise(
            "kept scales larger than under the same penalty on all",
            "mechanism",
            found[f"kept scale, {mine}"],
            found[f"kept scale, {plain}"],
        ),
        promise(
            "marked scales below 0.02",
            "mechanism",
            [0.02 - x for x in found[f"marked scale, {mine}"]],
        ),
        promise(
            "the cut costs less than 1%",
            "quality",
            [0.01 - x for x in found[f"lost at the cut, {mine}"]],
        ),
        promise(
            f"no more than 0.5% below L1 on all, best penalties "
            f"({ours.split()[-1]}, {theirs.split()[-1]})",
            "quality",
            found[ours],
            found[theirs],
            0.005,
        ),
    ]


CLAIM = Claim(
    gs.weights.MaskSparsity,
    "Pulling only the channels that will go leaves the others larger scales, makes the cut "
    "harmless, and ends no worse than an L1 pull on all.",
    "Digits, MLP 64-64-32-10 with BatchNorm, half of the channels, 200 steps dense and 200 with the "
    "penalty, cut at three quarters.",
    one,
    promises,
    remark="The baseline pulls all scales and is cut by those it ends with. Both take the best of "
    "four penalties on the same held-out digits. L1 on all with penalty 0 is a cut without a pull.",
)
