"""Random pruning on the digits: trained afterwards, does the gap to dense shrink with width, and does
a wide network at half its weights lose nothing?"""

from __future__ import annotations

from typing import Any

from claims.ledger import main, promise, record
from claims.vision import accuracy, mlp, seeded, train

import gossamer as gs


def one(width: int, density: float, seed: int, steps: int) -> tuple[float, float]:
    """Accuracies trained dense, and trained after random pruning."""
    dense = seeded(lambda: mlp(width, width, norm=True), seed)
    train(dense, None, steps, seed)
    pruned = seeded(lambda: mlp(width, width, norm=True), seed)
    gs.prune(pruned, gs.weights.Random(seed), density=density, include=("*",))
    train(pruned, gs.weights.FixedMasks(), steps, seed)
    return accuracy(dense, seed), accuracy(pruned, seed)


def check(short: bool = False) -> dict[str, Any]:
    """Four seeds; widths 16 and 256 at 10%, width 256 at 50%."""
    seeds, steps, wide = (2, 20, 32) if short else (4, 100, 256)
    narrow_runs = [one(16, 0.1, seed, steps) for seed in range(seeds)]
    wide_runs = [one(wide, 0.1, seed, steps) for seed in range(seeds)]
    half_runs = [one(wide, 0.5, seed, steps) for seed in range(seeds)]
    arms = {
        "dense, width 16": [run[0] for run in narrow_runs],
        "10%, width 16": [run[1] for run in narrow_runs],
        f"dense, width {wide}": [run[0] for run in wide_runs],
        f"10%, width {wide}": [run[1] for run in wide_runs],
        f"50%, width {wide}": [run[1] for run in half_runs],
    }
    gaps = [[a - b for a, b in runs] for runs in (narrow_runs, wide_runs)]
    return record(
        "random",
        "A randomly pruned wide network, trained sparse, matches its dense counterpart; the gap to "
        "dense shrinks as networks grow wider.",
        f"Digits, MLP 64-w-w-10 with BatchNorm pruned before training, {steps} steps, {seeds} seeds.",
        arms,
        [
            promise(f"gap at 10% smaller at width {wide} than 16", gaps[0], gaps[1]),
            promise(
                f"50% at width {wide} no more than 0.5% below dense",
                arms[f"50%, width {wide}"],
                arms[f"dense, width {wide}"],
                0.005,
            ),
        ],
    )


if __name__ == "__main__":
    main(check)
