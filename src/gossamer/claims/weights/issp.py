"""ISS-P on upscaling digits from 4x4 to 8x8: soft shrinkage against hard thresholding, against
pruning at the start, and against the paper's own baseline, pruning a trained network by L1-norm."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.testbed.vision import Digits

DENSITY = 0.05
ALPHAS, CUTS = (0.95, 0.98, 0.99, 0.995, 0.998), (0.125, 0.25, 0.5)
"""Strengths of ISS-P, of which 0.95 is the paper's, and the ends of the stage for it and for the
baseline."""
SOFT, HARD, NORM = "ISS-P 0.95, cut at 0.5", "hard thresholding", "L1-norm, cut at 0.5"


def train(method: gs.weights.ISSP, problem: Digits, steps: int) -> tuple[float, list[float]]:
    """Held-out squared error times 1000, and the share of kept positions that changed over each
    tenth of the run."""
    _, _, test_x, _ = problem.data
    torch.manual_seed(problem.split)
    model = nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256),
        nn.ReLU(), nn.Linear(256, 64),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    chosen = [largest(model)]
    with gs.sparse_training(model, optimizer, method, total_steps=steps, include=("*",)):
        for step in range(steps):
            x, _ = problem.batch(step, problem.split)
            optimizer.zero_grad()
            nn.functional.l1_loss(model(x), x.flatten(1)).backward()
            optimizer.step()
            if (step + 1) % (steps // 10) == 0:
                chosen.append(largest(model))
    churn = [float((b & ~a).sum() / a.sum()) for a, b in pairwise(chosen)]
    with torch.no_grad():
        return 1000 * float((model(test_x) - test_x.flatten(1)).square().mean()), churn


def largest(model: nn.Module) -> torch.Tensor:
    """Which weights are the largest of their layer, at the target density."""
    parts = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            size = layer.weight.detach().abs().flatten()
            parts.append(size > size.kthvalue(round((1 - DENSITY) * len(size))).values)
    return torch.cat(parts)


def one(seed: int, short: bool) -> dict[str, float]:
    """Errors, and the churn of the positions that would be kept."""
    steps, problem = 20 if short else 500, Digits(seed)
    methods = {
        f"ISS-P {a:g}, cut at {c:g}": gs.weights.ISSP(DENSITY, alpha=a, until=c)
        for a in ALPHAS
        for c in CUTS
    }
    methods |= {
        f"L1-norm, cut at {c:g}": gs.weights.ISSP(DENSITY, alpha=1.0, until=c) for c in CUTS
    }
    methods |= {
        HARD: gs.weights.ISSP(DENSITY, alpha=0.0),
        "at the start": gs.weights.ISSP(DENSITY, until=0.0),
    }
    found = {}
    for name, method in methods.items():
        found[name], churn = train(method, problem, steps)
        if name in (SOFT, HARD):
            found[f"changed in the second tenth, {name}"] = churn[1]
            found[f"changed in the fifth tenth, {name}"] = churn[4]
    return found


def promises(found: Figures) -> list[Promise]:
    """Errors at the paper's strength and at the best, and how the kept positions move."""

    def best(name: str) -> str:
        return min((key for key in found if key.startswith(name)), key=lambda k: sum(found[k]))

    soft, norm = best("ISS-P"), best("L1-norm")
    early, late = (f"changed in the {x} tenth, " for x in ("second", "fifth"))
    return [
        promise("0.95: less error than hard thresholding", "quality", found[HARD], found[SOFT]),
        promise("hard less error than at the start", "quality", found["at the start"], found[HARD]),
        promise("0.95: less error than L1-norm at its cut", "quality", found[NORM], found[SOFT]),
        promise(f"at their best ({soft}; {norm}) less error", "quality", found[norm], found[soft]),
        promise(
            "positions move more than under hard thresholding",
            "mechanism",
            found[early + SOFT],
            found[early + HARD],
        ),
        promise("and settle", "mechanism", found[early + SOFT], found[late + SOFT]),
    ]


CLAIM = Claim(
    gs.weights.ISSP,
    "Shrinking softly at every step ends with less error than pruning by L1-norm, than hard "
    "thresholding at every step, and than pruning at the start.",
    "Digits averaged to 4x4 and restored to 8x8, MLP 16-256-256-64 at 5%, L1 loss, Adam, 500 steps; held-out squared error x 1000.",
    one,
    promises,
    remark="L1-norm pruning trains dense, prunes each layer by magnitude and goes on under the "
    "mask, in as many steps. Both have the same grid of cuts, ISS-P one of strengths too; the best are "
    "chosen on the same held-out digits. The paper selects for about 100,000 steps at 0.95.",
)
