"""Magnitude pruning on the digits: with retraining, does a ninth of the weights keep the accuracy?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import train
from gossamer.testbed.vision import Digits


def one(seed: int, short: bool) -> dict[str, float]:
    """Accuracies dense, pruned, and retrained; and of a random support retrained as long."""
    steps, problem = 30 if short else 200, Digits(seed)
    model = problem.build(seed)
    train(problem, model, None, steps)
    found = {"dense": problem.quality(model)}
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, method in (
        ("magnitude", gs.weights.Magnitude()),
        ("random", gs.weights.Random(seed)),
    ):
        model.load_state_dict(trained)
        gs.prune(model, method, density=1 / 9, include=("*",))
        found[f"{name}, as pruned"] = problem.quality(model)
        train(problem, model, gs.weights.FixedMasks(), steps, lr=0.05)
        found[f"{name}, retrained"] = problem.quality(model)
    model.load_state_dict(trained)
    train(problem, model, None, steps, lr=0.05)
    found["dense, trained on"] = problem.quality(model)
    return found


def promises(found: Figures) -> list[Promise]:
    """As good as dense, better than unretrained, better than a random support."""
    kept = found["magnitude, retrained"]
    return [
        promise("retrained no more than 0.5% below dense", "quality", kept, found["dense"], 0.005),
        promise("retraining helps", "quality", kept, found["magnitude, as pruned"]),
        promise("above a random support", "quality", kept, found["random, retrained"]),
    ]


CLAIM = Claim(
    gs.weights.Magnitude,
    "With retraining, a network keeps its accuracy with a ninth of its weights.",
    "Digits, MLP 64-128-64-10, 200 steps before and after pruning.",
    one,
    promises,
    remark="Dense is the network that was pruned, as in the paper; the same network trained on for "
    "as long as the pruned one stands beside it.",
)
