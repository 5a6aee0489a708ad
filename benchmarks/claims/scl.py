"""SCL on the digits: does the price set the sparsity, do layers differ, does a rectified estimator
strand connections, and is it as good as GMP at its own density?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from claims.ledger import main, promise, record
from claims.vision import accuracy, mlp, seeded, train

import gossamer as gs


def one(method: Any, seed: int, steps: int) -> tuple[float, float, float, float]:
    """Accuracy, density, largest over smallest layer density, returns from off to on by weight."""
    model = seeded(lambda: mlp(128, 64), seed)
    last: dict[str, Any] = {}
    returns = 0

    def watch(run: gs.SparseRun) -> None:
        nonlocal returns
        returns += sum(int((mask & ~last[n]).sum()) for n, mask in run.masks.items() if n in last)
        last.update(run.masks)

    run = train(model, method, steps, seed, watch=watch)
    assert run is not None
    shares = [float(mask.double().mean()) for mask in run.masks.values()]
    size = sum(mask.numel() for mask in run.masks.values())
    return accuracy(model, seed), run.density, max(shares) / min(shares), returns / size


def check(short: bool = False) -> dict[str, Any]:
    """Five seeds, three prices."""
    seeds, steps = (2, 30) if short else (5, 400)
    prices = (0.01, 0.03, 0.1)
    rate = 0.5
    runs = {p: [one(gs.weights.SCL(p, rate), s, steps) for s in range(seeds)] for p in prices}
    relu = [one(gs.weights.SCL(prices[1], rate, slope=0.0), s, steps) for s in range(seeds)]
    raw = [one(gs.weights.SCL(1e-4, 100.0, normalise=False), s, steps) for s in range(seeds)]
    middle = runs[prices[1]]
    every = max(1, steps // 40)
    gmp = [one(gs.weights.GMP(r[1], gs.ERK(), every), s, steps) for s, r in enumerate(middle)]
    arms = {f"accuracy, price {p:g}": [r[0] for r in runs[p]] for p in prices}
    arms |= {f"density, price {p:g}": [r[1] for r in runs[p]] for p in prices}
    arms |= {
        "accuracy, GMP at the middle price's density": [r[0] for r in gmp],
        "layer densities, largest / smallest, middle price": [r[2] for r in middle],
        "layer densities, largest / smallest, not normalised": [r[2] for r in raw],
        "returns per weight, identity": [r[3] for r in middle],
        "returns per weight, rectified": [r[3] for r in relu],
    }
    promises = [
        promise(
            f"density lower at price {b:g} than {a:g}",
            [r[1] for r in runs[a]],
            [r[1] for r in runs[b]],
        )
        for a, b in pairwise(prices)
    ]
    promises += [
        promise("layers end at different densities", [r[2] for r in middle], 1.2),
        promise(
            "less extreme than without normalising", [r[2] for r in raw], [r[2] for r in middle]
        ),
        promise(
            "rectified estimator has fewer returns", [r[3] for r in middle], [r[3] for r in relu]
        ),
        promise(
            "no more than 0.5% below GMP at its density",
            [r[0] for r in middle],
            [r[0] for r in gmp],
            0.005,
        ),
    ]
    return record(
        "scl",
        "The price alone sets sparsity and its spread over layers; identity straight-through lets "
        "connections return; accuracy is no worse than that of designed pruning.",
        f"Digits, MLP 64-128-64-10, {steps} steps, {seeds} seeds.",
        arms,
        promises,
    )


if __name__ == "__main__":
    main(check)
