"""MaskSparsity on the digits: against the same pull on every scale, are the kept scales larger, is
the cut harmless, and is the outcome no worse?"""

from __future__ import annotations

from typing import Any

import torch
from claims.ledger import main, promise, record
from claims.vision import accuracy, mlp, seeded, train

import gossamer as gs

COUPLED = (
    gs.Coupled(64, ("1",), ("2",), (), ("4",)),
    gs.Coupled(32, ("4",), ("5",), (), ("7",)),
)


def one(targeted: bool, seed: int, steps: int) -> tuple[float, float, float, float]:
    """Final accuracy, loss of accuracy at the cut, mean kept and mean marked scale before it."""
    model = seeded(lambda: mlp(64, 32, norm=True), seed)
    train(model, None, steps, seed)
    method = gs.weights.MaskSparsity(0.5, COUPLED, penalty=0.03, targeted=targeted)
    cut = int(0.75 * steps)
    seen: list[float] = []
    scales: list[float] = []
    before: dict[str, torch.Tensor] = {}

    def watch(run: gs.SparseRun) -> None:
        if run.step in (cut - 1, cut):
            seen.append(accuracy(run.model, seed))
        if run.step == cut - 1:
            before.update({x.name: x.weight.detach().abs().clone() for x in run.layers})
        if run.step == cut:
            kept = torch.cat([run.masks[name].flatten() for name in before])
            scale = torch.cat(list(before.values()))
            scales.extend((float(scale[kept].mean()), float(scale[~kept].mean())))

    train(model, method, steps, seed, watch=watch, decay=0.0)
    return accuracy(model, seed), seen[0] - seen[1], scales[0], scales[1]


def check(short: bool = False) -> dict[str, Any]:
    """Four seeds, half of the channels."""
    seeds, steps = (2, 30) if short else (4, 200)
    mine = [one(True, seed, steps) for seed in range(seeds)]
    plain = [one(False, seed, steps) for seed in range(seeds)]
    words = ("accuracy", "lost at the cut", "kept scale", "marked scale")
    arms = {f"{w}, MaskSparsity": [r[i] for r in mine] for i, w in enumerate(words)}
    arms |= {f"{w}, L1 on all": [r[i] for r in plain] for i, w in enumerate(words)}
    return record(
        "masksparsity",
        "Pulling only the channels that will go leaves the others larger scales, makes the cut "
        "harmless, and ends no worse than the same pull on all.",
        f"Digits, MLP 64-64-32-10 with BatchNorm, half of the channels, {steps} steps dense and "
        f"{steps} with the penalty 0.03, cut at three quarters, {seeds} seeds.",
        arms,
        [
            promise(
                "kept scales larger",
                arms["kept scale, MaskSparsity"],
                arms["kept scale, L1 on all"],
            ),
            promise("marked scales below 0.02", [0.02 - r[3] for r in mine]),
            promise("the cut costs less than 1%", [0.01 - r[1] for r in mine]),
            promise(
                "no more than 0.5% below L1 on all",
                arms["accuracy, MaskSparsity"],
                arms["accuracy, L1 on all"],
                0.005,
            ),
        ],
    )


if __name__ == "__main__":
    main(check)
