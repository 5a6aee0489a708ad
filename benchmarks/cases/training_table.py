"""Sparse training of a digits CNN at 95% sparsity, 5 seeds: the whole table.

Run: python benchmarks/cases/training_table.py. Writes benchmarks/results/training_table.json.
Arms take the same number of steps, so only arms of one allocation and a constant density do equal
training FLOPs; GMP and GraNet spend more. `train_flops` is the share of a dense run's multiply-adds, counted from the densities of each
layer at each step, plus a dense weight gradient in the steps that grow by it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

import gossamer as gs
from gossamer.testbed import digits

ROOT = Path(__file__).resolve().parents[2]
SEEDS, EPOCHS, BATCH, DENSITY = range(5), 15, 128, 0.05
T_95 = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}
PLACES = {"0": 64, "3": 64, "7": 16, "12": 1}


def network() -> nn.Sequential:
    """A small CNN with BatchNorm; the last layer is masked too."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def arms(every: int) -> dict[str, object]:
    """The methods, with an update every `every` steps (an epoch or so)."""
    return {
        "dense": None,
        "static, uniform": gs.StaticRandom(DENSITY, gs.Uniform()),
        "static, ERK": gs.StaticRandom(DENSITY, gs.ERK()),
        "SNIP": gs.SNIP(DENSITY),
        "SET": gs.SET(DENSITY, gs.ERK(), every=every),
        "RigL": gs.RigL(DENSITY, every=every),
        "GMP": gs.GMP(DENSITY, gs.ERK(), every=every),
        "GraNet": gs.GraNet(DENSITY, every=every),
        "GraNet without regrowth": gs.GraNet(DENSITY, every=every, regrow=False),
    }


def train(method: object, seed: int) -> dict[str, float]:
    """One run: accuracy, density, training FLOPs as a share of dense."""
    train_x, train_y, test_x, test_y = digits(seed=seed)
    torch.manual_seed(seed)
    model = network()
    per_epoch = math.ceil(len(train_x) / BATCH)
    total = EPOCHS * per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    order = torch.Generator().manual_seed(seed)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(train_x[rows]), train_y[rows])

    def loop(run: gs.SparseRun | None) -> float:
        spent = 0.0
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(train_x), generator=order).split(BATCH):
                spent += step_cost(run)
                optimizer.zero_grad()
                loss_of(rows).backward()
                optimizer.step()
                decay.step()
        return spent / total

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
    return {"accuracy": float(accuracy), "density": density, "train_flops": flops}


def step_cost(run: gs.SparseRun | None) -> float:
    """Multiply-adds of a step over a dense one: forward, input gradient, weight gradient."""
    if run is None:
        return 1.0
    grows = run.trainer.gradients_at_update and run.trainer.due(run.step + 1, run.total_steps)
    spent = dense = 0.0
    for name, mask in run.masks.items():
        work = mask.numel() * PLACES[name]
        share = float(mask.double().mean())
        dense += 3 * work
        spent += work * (2 * share + (1.0 if grows else share))
    return spent / dense


def summary(values: list[float]) -> dict[str, float]:
    """Mean and half the width of the 95% confidence interval (Student's t)."""
    numbers = torch.tensor(values, dtype=torch.float64)
    half = T_95[len(values) - 1] * float(numbers.std()) / math.sqrt(len(values))
    return {"mean": float(numbers.mean()), "ci95": half}


def job(which: tuple[str, int]) -> dict[str, float]:
    """One arm on one seed, in a process of its own."""
    result = train(arms(11)[which[0]], which[1])
    print(*which, result, file=sys.stderr, flush=True)
    return result


def main() -> None:
    """Run every arm on every seed and write the table."""
    rows = {}
    jobs = [(name, seed) for name in arms(11) for seed in SEEDS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        results = list(pool.map(job, jobs))
    for name in arms(11):
        runs = [result for (arm, _), result in zip(jobs, results) if arm == name]
        accuracies = [run["accuracy"] for run in runs]
        rows[name] = {
            **summary(accuracies),
            "accuracies": accuracies,
            "density": runs[0]["density"],
            "train_flops": summary([run["train_flops"] for run in runs])["mean"],
        }
        print(name, {k: v for k, v in rows[name].items() if k != "accuracies"}, file=sys.stderr)
    base = rows["static, ERK"]["accuracies"]
    for row in rows.values():
        row["over_static_erk"] = summary([a - b for a, b in zip(row["accuracies"], base)])
    record = {
        "data": "scikit-learn digits, 25% held out by the seed",
        "network": "conv 8-16-32 with BatchNorm, linear 128-10",
        "density": DENSITY, "epochs": EPOCHS, "update_every": 11, "batch": BATCH, "seeds": len(SEEDS),
        "optimizer": "SGD 0.1, momentum 0.9, weight decay 5e-4, cosine",
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    out = ROOT / "benchmarks" / "results" / "training_table.json"
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
