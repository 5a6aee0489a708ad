"""SCL on the digits: does the price set the sparsity, do layers differ, does a rectified estimator
strand connections, and is it as good as GMP at its own density?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.vision import train
from gossamer.testbed.vision import Digits

PRICES, RATE = (0.01, 0.03, 0.1), 0.5
GMPS = ("by layer", "global")


def measure(method: Any, seed: int, steps: int) -> dict[str, float]:
    """Accuracy, density, largest over smallest layer density, returns from off to on by weight."""
    problem, returns = Digits(seed), 0
    model = problem.build(seed)
    last: dict[str, Any] = {}

    def watch(run: gs.SparseRun) -> None:
        nonlocal returns
        returns += sum(int((mask & ~last[n]).sum()) for n, mask in run.masks.items() if n in last)
        last.update(run.masks)

    run = train(problem, model, method, steps, watch=watch)
    assert run is not None
    shares = [float(mask.double().mean()) for mask in run.masks.values()]
    size = sum(mask.numel() for mask in run.masks.values())
    return {
        "accuracy": problem.quality(model),
        "density": run.density,
        "spread": max(shares) / min(shares),
        "returns": returns / size,
    }


def one(seed: int, short: bool) -> dict[str, float]:
    """Three prices, a rectified estimator, no normalising, and GMP at the middle price's density."""
    steps, found = 30 if short else 400, {}
    for price in PRICES:
        run = measure(gs.weights.SCL(price, RATE), seed, steps)
        found[f"accuracy, price {price:g}"] = run["accuracy"]
        found[f"density, price {price:g}"] = run["density"]
        if price == PRICES[1]:
            middle = run
    rectified = measure(gs.weights.SCL(PRICES[1], RATE, slope=0.0), seed, steps)
    raw = measure(gs.weights.SCL(1e-4, 100.0, normalise=False), seed, steps)
    every = max(1, steps // 40)
    gmps = (
        gs.weights.GMP(middle["density"], gs.ERK(), every),
        gs.weights.GMP(middle["density"], every=every, scope="global"),
    )
    for name, method in zip(GMPS, gmps):
        found[f"accuracy, GMP {name}"] = measure(method, seed, steps)["accuracy"]
    return found | {
        "layer densities, largest / smallest": middle["spread"],
        "layer densities, largest / smallest, not normalised": raw["spread"],
        "returns per weight, identity": middle["returns"],
        "returns per weight, rectified": rectified["returns"],
    }


def promises(found: Figures) -> list[Promise]:
    """What the price and the estimator do, and the accuracy."""
    spread = "layer densities, largest / smallest"
    gmp = max(GMPS, key=lambda name: sum(found[f"accuracy, GMP {name}"]))
    lower = [
        promise(
            f"density lower at price {b:g} than {a:g}",
            "mechanism",
            found[f"density, price {a:g}"],
            found[f"density, price {b:g}"],
        )
        for a, b in pairwise(PRICES)
    ]
    return [
        *lower,
        promise("layers end at different densities", "mechanism", found[spread], 1.2),
        promise(
            "less extreme than without normalising",
            "mechanism",
            found[f"{spread}, not normalised"],
            found[spread],
        ),
        promise(
            "rectified estimator has fewer returns",
            "mechanism",
            found["returns per weight, identity"],
            found["returns per weight, rectified"],
        ),
        promise(
            f"no more than 0.5% below GMP, {gmp}, at its density",
            "quality",
            found[f"accuracy, price {PRICES[1]:g}"],
            found[f"accuracy, GMP {gmp}"],
            0.005,
        ),
    ]


CLAIM = Claim(
    gs.weights.SCL,
    "The price alone sets sparsity and its spread over layers; identity straight-through lets "
    "connections return; accuracy is no worse than that of designed pruning.",
    "Digits, MLP 64-128-64-10, 400 steps; GMP at the density of the middle price on each seed.",
    one,
    promises,
    remark="Of two GMPs, by layer and global, the better on the same held-out digits is taken, in "
    "its favour.",
)
