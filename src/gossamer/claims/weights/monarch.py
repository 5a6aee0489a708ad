"""Monarch on text: near dense, better than low rank at equal parameters, and a head start for dense?"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.text import RATES, STEPS, LowRank, multiply_adds, train, tuned
from gossamer.engine.prune.replace import ReplaceLayersResult
from gossamer.testbed.language import Text

DENSITY = 2880 / 11264
"""Of the feed-forward layers: slices of rank 3 in four blocks, and as many weights at rank 12."""
ATTENTION = ("*.self_attn.*",)
MONARCH = gs.weights.Monarch(start="random")
SLACK = 0.05
EARLY = 0.8
"""The part of the steps that reverse sparsification takes with Monarch layers."""
REVERSE, SHORTER = "Monarch then dense", "dense for its multiply-adds"
WAYS = ("dense", SHORTER, "magnitude", "low rank", "Monarch", REVERSE)


def replaced(method: Any, seed: int) -> ReplaceLayersResult:
    """An untrained model with new feed-forward layers."""
    model = Text().build(seed)
    return gs.replace_layers(model, method, density=DENSITY, exclude=ATTENTION, seed=seed)


def fit(name: str, seed: int, steps: int, rate: float) -> float:
    """Bits per byte after training by one of the ways."""
    problem = Text()

    def measure(model: nn.Module, method: Any = None, length: int = steps, **how: Any) -> float:
        train(problem, model, method, length, lr=rate, seed=seed, **how)
        return problem.quality(model)

    if name == "dense":
        return measure(problem.build(seed))
    if name == "magnitude":
        gmp = gs.weights.GMP(DENSITY, every=max(1, steps // 40))
        return measure(problem.build(seed), gmp, exclude=ATTENTION)
    if name == "low rank":
        return measure(replaced(LowRank(), seed).model)
    model = replaced(MONARCH, seed).model
    if name == "Monarch":
        return measure(model)
    if name == SHORTER:
        dense = problem.build(seed)
        share = EARLY * multiply_adds(model) / multiply_adds(dense) + 1 - EARLY
        return measure(dense, length=round(share * steps))
    change = int(EARLY * steps)
    measure(model, last=change)
    gs.fold_layers(model)
    return measure(model, first=change)


@cache
def rates(short: bool) -> dict[str, float]:
    """Of each way; the short form tries none."""
    return dict.fromkeys(WAYS, RATES[0]) if short else tuned(fit, WAYS, STEPS)


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per byte of each way, and what is exact."""
    found = {}
    for name, rate in rates(short).items():
        found[name] = fit(name, seed, 5 if short else STEPS, rate)
        found[f"learning rate, {name}"] = rate
    monarch, thin = replaced(MONARCH, seed), replaced(LowRank(), seed)
    before = Text().quality(monarch.model)
    gs.fold_layers(monarch.model)
    return found | {
        "density, Monarch": monarch.measured_density,
        "density, low rank": thin.measured_density,
        "bits changed by folding": abs(Text().quality(monarch.model) - before),
        "error of the projected Hadamard matrix": hadamard(),
    }


@torch.no_grad()
def hadamard() -> float:
    """The norm of the error over the norm, for order 64 at a quarter of the weights."""
    weight = torch.ones(1, 1)
    while len(weight) < 64:
        weight = torch.kron(weight, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.copy_(weight)
    method = gs.weights.Monarch(8)
    found = gs.replace_layers(nn.Sequential(layer), method, density=0.25, include=("*",))
    return found.errors["0"]


def promises(found: Figures) -> list[Promise]:
    """What is exact, and bits against the other ways."""
    mine, reverse, dense = found["Monarch"], found[REVERSE], found["dense"]
    near = f"no more than {SLACK:g} bits above dense"
    gap = [abs(a - b) for a, b in zip(found["density, Monarch"], found["density, low rank"])]
    exact = {
        "the Hadamard matrix of order 64 projects": found["error of the projected Hadamard matrix"],
        "folding keeps the bits": found["bits changed by folding"],
        "as many weights as low rank": gap,
    }
    return [
        *(
            promise(f"{what}, to 1e-5", "mechanism", [1e-5 - x for x in values])
            for what, values in exact.items()
        ),
        Promise(
            "twice as fast",
            "mechanism",
            reason="the paper claims it of GPUs at widths of 768 and more; small block products "
            "are slower than a dense one on most processors",
        ),
        promise(near, "quality", dense, mine, SLACK),
        promise("below low rank", "quality", found["low rank"], mine),
        promise("below magnitude", "quality", found["magnitude"], mine),
        promise(f"multiplied out late, {near}", "quality", dense, reverse, SLACK),
        promise(f"multiplied out late, below {SHORTER}", "quality", found[SHORTER], reverse),
    ]


CLAIM = Claim(
    gs.weights.Monarch,
    "Training is twice as fast at similar quality; multiplied out after a first phase and trained "
    "on dense, pretraining ends as well at half the cost.",
    "Python's documentation and code, Llama of 2 blocks and width 64, feed-forward layers at "
    f"{DENSITY:.1%} of their weights, {STEPS} steps of AdamW; bits per byte of held-out text.",
    one,
    promises,
    remark="Each way's learning rate is the best of four on another seed. Low rank begins with the "
    "nearest product to the dense start. Magnitude is GMP, which trains dense at first. What is "
    "multiplied out late takes four fifths of its steps with Monarch layers, and its optimizer "
    "begins anew there.",
)
