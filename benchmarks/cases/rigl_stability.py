"""Why RigL collapses on some seeds of the digits CNN at 5% density, found by changing one thing.

Run: python benchmarks/cases/rigl_stability.py. Writes benchmarks/results/rigl_stability.json.
Every variant trains 15 epochs on 5 seeds, updating every 11 steps (an epoch) unless it says so, and
counts how many of the weights that convolutions grow land in channels that were empty.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_table import BATCH, DENSITY, SEEDS, network, summary

import gossamer as gs
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed import digits

OUT = Path(__file__).resolve().parents[1] / "results" / "rigl_stability.json"
STEPS = 165
VARIANTS: dict[str, dict[str, Any]] = {
    "as it was (eps 1e-5)": {},
    "batch norm eps 1e-4": {"eps": 1e-4},
    "batch norm eps 1e-3": {"eps": 1e-3},
    "batch norm eps 1e-2": {"eps": 1e-2},
    "group norm": {"group": True},
    "learning rate 0.03": {"lr": 0.03},
    "update every 22": {"every": 22},
    "update every 33": {"every": 33},
    "drop 0.1": {"drop": 0.1},
    "growth by 8 batches": {"batches": 8},
}
CAUSE = (
    "An emptied channel has no variance, so batch norm multiplies the gradient into it by "
    "1 / sqrt(eps), 316 times at 1e-5. Growth by |gradient| then puts whole layers' new weights "
    "into emptied channels, where they stay small and are dropped again; what they cost empties "
    "further channels. A larger eps ends it; later or smaller updates make it rarer, because they "
    "empty fewer channels."
)


def train(seed: int, options: dict[str, Any]) -> dict[str, float]:
    """Accuracy, and what RigL grew in convolutions: how many weights, how many in empty channels."""
    train_x, train_y, test_x, test_y = digits(seed=seed)
    torch.manual_seed(seed)
    model = network(options.get("eps", 1e-5))
    if options.get("group"):
        for index in (1, 4, 8):
            model[index] = nn.GroupNorm(1, model[index].num_features)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.get("lr", 0.1), momentum=0.9, weight_decay=5e-4
    )
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.Generator().manual_seed(seed)
    every = options.get("every", 11)
    method = gs.weights.RigL(DENSITY, every=every, drop=options.get("drop", 0.3))
    grown = wasted = 0
    with gs.sparse_training(model, optimizer, method, total_steps=STEPS, include=("12",),
                            seed=seed) as run:  # fmt: skip
        for step in range(1, STEPS + 1):
            before = run.masks
            batches = options.get("batches", 1) if step % every == 0 else 1
            optimizer.zero_grad()
            for _ in range(batches):
                rows = torch.randint(0, len(train_x), (BATCH,), generator=order)
                loss = nn.functional.cross_entropy(model(train_x[rows]), train_y[rows])
                (loss / batches).backward()
            optimizer.step()
            rate.step()
            for name in ("0", "3", "7"):
                new = run.masks[name] & ~before[name]
                grown += int(new.sum())
                wasted += int(new[~before[name].any(1)].sum())
        empty = sum(int((~run.masks[name].any(1)).sum()) for name in ("0", "3", "7"))
    model.eval()
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(1) == test_y).double().mean())
    return {"accuracy": accuracy, "grown": grown, "into_empty": wasted, "empty_channels": empty}


def job(which: tuple[str, int]) -> dict[str, float]:
    """One variant on one seed."""
    return train(which[1], VARIANTS[which[0]])


def main() -> None:
    """Run every variant on every seed and write the table."""
    jobs = [(name, seed) for name in VARIANTS for seed in SEEDS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        results = list(pool.map(job, jobs))
    rows = {}
    for name in VARIANTS:
        runs = [r for (variant, _), r in zip(jobs, results) if variant == name]
        lists = {key: [run[key] for run in runs] for key in runs[0]}
        rows[name] = {**summary(lists["accuracy"]), **lists}
        print(name, rows[name], file=sys.stderr)
    record = {
        "network": "the CNN of training_table.py, 56 channels in all",
        "density": DENSITY, "steps": STEPS, "seeds": len(SEEDS), "cause": CAUSE,
        "machine": machine(), "rows": rows,
    }  # fmt: skip
    OUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
