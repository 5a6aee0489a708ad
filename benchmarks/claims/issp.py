"""ISS-P on upscaling digits from 4x4 to 8x8: soft shrinkage against hard thresholding and against
pruning at the start."""

from __future__ import annotations

from typing import Any

import torch
from claims.ledger import main, promise, record
from torch import nn

import gossamer as gs
from gossamer.testbed import digits

DENSITY = 0.05


def one(method: gs.weights.ISSP, seed: int, steps: int) -> float:
    """Held-out squared error, times 1000."""
    train_x, _, test_x, _ = digits(seed=seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256),
        nn.ReLU(), nn.Linear(256, 64),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    with gs.sparse_training(model, optimizer, method, total_steps=steps, include=("*",)):
        for _ in range(steps):
            rows = torch.randint(0, len(train_x), (64,), generator=order)
            optimizer.zero_grad()
            nn.functional.l1_loss(model(train_x[rows]), train_x[rows].flatten(1)).backward()
            optimizer.step()
    with torch.no_grad():
        return 1000 * float((model(test_x) - test_x.flatten(1)).square().mean())


def check(short: bool = False) -> dict[str, Any]:
    """Five seeds at 5%."""
    seeds, steps = (2, 20) if short else (5, 500)
    methods = {
        "ISS-P": gs.weights.ISSP(DENSITY, alpha=0.95),
        "hard thresholding": gs.weights.ISSP(DENSITY, alpha=0.0),
        "at the start": gs.weights.ISSP(DENSITY, until=0.0),
    }
    arms = {n: [one(m, seed, steps) for seed in range(seeds)] for n, m in methods.items()}
    return record(
        "issp",
        "Shrinking softly at every step ends with less error than hard thresholding at every step, "
        "and that with less than pruning at the start.",
        f"Digits averaged to 4x4 and restored to 8x8, MLP 16-256-256-64 at 5%, L1 loss, Adam, "
        f"{steps} steps, {seeds} seeds; held-out squared error x 1000.",
        arms,
        [
            promise("less error than hard thresholding", arms["hard thresholding"], arms["ISS-P"]),
            promise("hard less than at the start", arms["at the start"], arms["hard thresholding"]),
        ],
    )


if __name__ == "__main__":
    main(check)
