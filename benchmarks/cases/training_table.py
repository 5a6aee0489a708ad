"""Sparse training of a digits CNN at 95% sparsity at equal training FLOPs: the whole table.

Run: python benchmarks/cases/training_table.py [JOURNAL]. Writes
benchmarks/results/training_table.json; JOURNAL, a file of one line a run, lets it go on after a
kill. One process and thread, about an hour.
Every variant trains for as many steps as the budget buys, to 1% of it unless the rounding of its
schedule jumps across (GraNet, one seed, 3%): `train_flops` counts
multiply-adds from the densities of each layer at each step, plus a dense weight gradient in the
steps that grow by it, in dense steps. A short run first finds what a step of the variant costs. Variants rewire 30 times in a run.
Arms marked eps 1e-3 have that in their batch norms in place of 1e-5: see rigl_stability.py.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gossamer as gs
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed import digits

ROOT = Path(__file__).resolve().parents[2]
SEEDS, BUDGET, BATCH, DENSITY, UPDATES = range(5), 99, 128, 0.05, 30
T_95 = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}
PLACES = {"0": 64, "3": 64, "7": 16, "12": 1}


def network(eps: float = 1e-5) -> nn.Sequential:
    """A small CNN with BatchNorm; the last layer is masked too."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, eps), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16, eps), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32, eps), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def method_of(variant: str, every: int) -> Any:
    """The method of a variant, with an update every `every` steps."""
    return {
        "dense": lambda: None,
        "static, uniform": lambda: gs.weights.StaticRandom(DENSITY, gs.Uniform()),
        "static, ERK": lambda: gs.weights.StaticRandom(DENSITY, gs.ERK()),
        "SNIP": lambda: gs.weights.SNIP(DENSITY),
        "SET": lambda: gs.weights.SET(DENSITY, gs.ERK(), every=every),
        "RigL": lambda: gs.weights.RigL(DENSITY, every=every),
        "GMP": lambda: gs.weights.GMP(DENSITY, gs.ERK(), every=every),
        "GraNet": lambda: gs.weights.GraNet(DENSITY, every=every),
        "GraNet without regrowth": lambda: gs.weights.GraNet(DENSITY, every=every, regrow=False),
    }[variant.removesuffix(", eps 1e-3")]()


ARMS = (
    "dense", "static, uniform", "static, ERK", "SNIP", "SET", "RigL", "RigL, eps 1e-3", "GMP",
    "GraNet", "GraNet without regrowth",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Accuracy on held-out digits, density, steps taken, and their FLOPs in dense steps: those of
    the kept weights, and those of the dense gradients that growth needs."""

    accuracy: float
    density: float
    steps: int
    kept_flops: float
    growth_flops: float


def train(variant: str, seed: int, total: int) -> Outcome:
    """One run of `total` steps."""
    train_x, train_y, test_x, test_y = digits(seed=seed)
    torch.manual_seed(seed)
    model = network(1e-3 if "eps" in variant else 1e-5)
    method = method_of(variant, max(1, total // UPDATES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    order = torch.Generator().manual_seed(seed)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(train_x[rows]), train_y[rows])

    def loop(run: gs.SparseRun | None) -> list[float]:
        spent, step = [0.0, 0.0], 0
        while True:
            for rows in torch.randperm(len(train_x), generator=order).split(BATCH):
                if step == total:
                    return spent
                spent = [a + b for a, b in zip(spent, step_cost(run))]
                optimizer.zero_grad()
                loss_of(rows).backward()
                optimizer.step()
                decay.step()
                step += 1

    if method is None:
        flops, density = loop(None), 1.0
    else:
        first = torch.randperm(len(train_x), generator=order)[: 4 * BATCH]
        with gs.sparse_training(
            model, optimizer, method, total_steps=total, include=("12",),
            loss=lambda: loss_of(first), seed=seed,
        ) as run:  # fmt: skip
            flops, density = loop(run), run.density
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).double().mean()
    return Outcome(float(accuracy), density, total, *flops)


def step_cost(run: gs.SparseRun | None) -> tuple[float, float]:
    """Multiply-adds of a step over a dense one (forward, input gradient, weight gradient), by the
    kept weights, and by the rest of the weight gradient where the step grows by it."""
    if run is None:
        return 1.0, 0.0
    grows = "gradients" in run.method.card.needs and run.method.due(run.step + 1, run.total_steps)
    kept = growth = dense = 0.0
    for name, mask in run.masks.items():
        work = mask.numel() * PLACES[name]
        share = float(mask.double().mean())
        dense += 3 * work
        kept += 3 * work * share
        growth += work * (1 - share) * grows
    return kept / dense, growth / dense


def summary(values: list[float]) -> dict[str, float]:
    """Mean and half the width of the 95% confidence interval (Student's t)."""
    numbers = torch.tensor(values, dtype=torch.float64)
    half = T_95[len(values) - 1] * float(numbers.std()) / math.sqrt(len(values))
    return {"mean": float(numbers.mean()), "ci95": half}


def job(variant: str, seed: int) -> Outcome:
    """One variant on one seed, for as long as the budget lasts."""
    # Growth costs about the same however long the run is: the number of updates is fixed.
    probe = train(variant, seed, 2 * UPDATES)
    left = BUDGET - probe.growth_flops
    found = train(variant, seed, round(left * probe.steps / probe.kept_flops))
    # Schedules round their updates to whole steps, so a run may miss the budget; then again.
    for _ in range(3):
        spent = found.kept_flops + found.growth_flops
        if abs(spent - BUDGET) <= 0.01 * BUDGET:
            break
        left = BUDGET - found.growth_flops
        found = train(variant, seed, round(left * found.steps / found.kept_flops))
    return found


def table(results: dict[tuple[str, int], Outcome]) -> dict[str, Any]:
    """The record of these runs; every variant on the same seeds."""
    rows: dict[str, Any] = {}
    seeds = sorted({seed for _, seed in results})
    for name in ARMS:
        runs = [results[name, seed] for seed in seeds]
        accuracies = [run.accuracy for run in runs]
        rows[name] = {
            **summary(accuracies),
            "accuracies": accuracies,
            "density": runs[0].density,
            "steps": [run.steps for run in runs],
            "train_flops": summary([run.kept_flops + run.growth_flops for run in runs]),
        }
    for name, row in rows.items():
        base = rows["static, ERK"]["accuracies"]
        row["over_static_erk"] = summary([a - b for a, b in zip(row["accuracies"], base)])
        print(name, {k: v for k, v in row.items() if k != "accuracies"}, file=sys.stderr)
    return {
        "data": "scikit-learn digits, 25% held out by the seed",
        "network": "conv 8-16-32 with BatchNorm, linear 128-10",
        "density": DENSITY, "budget": f"{BUDGET} dense steps of {BATCH} (9 epochs) for every variant, but for the rounding of schedules",
        "updates": UPDATES, "seeds": len(seeds),
        "optimizer": "SGD 0.1, momentum 0.9, weight decay 5e-4, cosine over the run",
        "machine": machine(), "rows": rows,
    }  # fmt: skip


def main() -> None:
    """Run every variant on every seed and write the table."""
    torch.set_num_threads(1)
    journal = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    results: dict[tuple[str, int], Outcome] = {}
    if journal and journal.exists():
        for line in journal.read_text().splitlines():
            entry = json.loads(line)
            results[entry["variant"], entry["seed"]] = Outcome(**entry["outcome"])
    for seed in SEEDS:
        for variant in ARMS:
            if (variant, seed) in results:
                continue
            outcome = results[variant, seed] = job(variant, seed)
            line = json.dumps({"variant": variant, "seed": seed, "outcome": asdict(outcome)})
            print(line, file=sys.stderr, flush=True)
            if journal:
                with journal.open("a") as stream:
                    stream.write(line + "\n")
    out = ROOT / "benchmarks" / "results" / "training_table.json"
    out.write_text(json.dumps(table(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
