"""Widths: cut by magnitude against at random on SmolLM2; and trained on against dense, against
random and against a small network from the start, on text."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from typing import Any

import torch
from torch import nn

import gossamer as gs
from gossamer.claims.language import HELD_OUT, WINDOW, subject
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.text import best, multiply_adds, train
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.engine.measure.tasks import Subject
from gossamer.testbed import heldout_text, language_model
from gossamer.testbed.language import Text

LARGE = (0.9, 0.7)
"""Of the neurons and heads of SmolLM2."""
DENSITY = 0.6
RATES, AGAIN = (3e-3, 1e-2), (1e-3, 3e-3, 1e-2)
"""Of training from the start, and of what follows the cut."""
SLACK = 0.03
Measured = tuple[float, float]


@cache
def pruned(density: float, scorer: Any, short: bool) -> Measured:
    """Bits per byte of SmolLM2 and its weights; the short form takes the bundled model."""
    on = Subject(language_model(), None) if short else subject()
    text = heldout_text()[: 2_000 if short else HELD_OUT]
    if scorer is not None:
        gs.prune(on.model, gs.weights.Widths(scorer), density=density)
    size = float(sum(p.numel() for p in on.model.parameters()))
    return bits_per_byte(on.model, text, window=256 if short else WINDOW, encode=on.encode), size


def large(seed: int, short: bool) -> dict[str, float]:
    """Without training afterwards."""
    found = {"SmolLM2, dense": pruned(1.0, None, short)[0]}
    for density in LARGE:
        for name, scorer in (
            ("magnitude", gs.weights.Magnitude()),
            ("random", gs.weights.Random(seed)),
        ):
            key = f"SmolLM2 at {density:.0%}, {name}"
            found[key], found[f"weights of {key}"] = pruned(density, scorer, short)
    return found


def small(seed: int, short: bool) -> dict[str, float]:
    """A network trained here, cut, and trained on."""
    problem, (steps, more) = Text(), (10, 5) if short else (500, 250)
    dense = problem.build(seed)
    train(problem, dense, None, steps, lr=RATES[1], seed=seed)
    networks = {"dense": dense}
    for name, scorer in (
        ("magnitude", gs.weights.Magnitude()),
        ("random", gs.weights.Random(seed)),
    ):
        networks[name] = copy.deepcopy(dense)
        gs.prune(networks[name], gs.weights.Widths(scorer), density=DENSITY)
    found = {f"{name}, before": problem.quality(model) for name, model in networks.items()}
    for name, model in networks.items():
        for rate in AGAIN:
            again = copy.deepcopy(model)
            train(problem, again, None, more, lr=rate, seed=1000 + seed)
            found[f"{name}, after, {rate:g}"] = problem.quality(again)
    cut: Any = networks["magnitude"]
    for rate in RATES:
        torch.manual_seed(seed)
        fresh = type(cut)(copy.deepcopy(cut.config))
        train(problem, fresh, None, steps + more, lr=rate, seed=seed)
        found[f"from the start, {rate:g}"] = problem.quality(fresh)
    return found | {
        "operations left": multiply_adds(cut) / multiply_adds(dense),
        "logits changed by reloading": reloaded(cut, problem),
    }


@torch.no_grad()
def reloaded(model: nn.Module, problem: Text) -> float:
    """The largest difference to what plain transformers load from the saved folder."""
    saved: Any = model
    ids = problem.batch(0, 0)
    with tempfile.TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        again = type(saved).from_pretrained(folder)
    model.eval()
    return float((again(ids).logits - saved(ids).logits).abs().max())


def one(seed: int, short: bool) -> dict[str, float]:
    """Both models."""
    return large(seed, short) | small(seed, short)


def promises(found: Figures) -> list[Promise]:
    """Counts, exactness, and the bits of what is cut by magnitude."""
    dense, mine, random = (best(found, f"{x}, after, ") for x in ("dense", "magnitude", "random"))
    start = best(found, "from the start, ")
    keys = [(f"SmolLM2 at {x:.0%}, magnitude", f"SmolLM2 at {x:.0%}, random") for x in LARGE]
    return [
        promise(
            "34% fewer operations or more",
            "mechanism",
            [0.66 - x for x in found["operations left"]],
        ),
        promise(
            "plain transformers load the smaller network: logits to 1e-6",
            "mechanism",
            [1e-6 - x for x in found["logits changed by reloading"]],
        ),
        *(
            promise(
                f"{more}: as many weights as at random",
                "mechanism",
                [
                    0.5 - abs(a - b)
                    for a, b in zip(*(found[f"weights of {x}"] for x in (more, less)))
                ],
            )
            for more, less in keys
        ),
        *(promise(f"fewer bits than {b}", "quality", found[b], found[a]) for a, b in keys),
        promise(
            "text, before: fewer bits than random",
            "quality",
            found["random, before"],
            found["magnitude, before"],
        ),
        promise(
            f"text, {mine}, no more than {SLACK:g} bits above {dense}",
            "quality",
            found[dense],
            found[mine],
            SLACK,
        ),
        promise(f"text, {mine}, below {random}", "quality", found[random], found[mine]),
        promise(f"text, {mine}, below {start}", "quality", found[start], found[mine]),
    ]


CLAIM = Claim(
    gs.weights.Widths,
    "Filters of the smallest weights can go, better than random ones: a third of the operations, at "
    "the accuracy of before once trained on; a small network from the start falls short.",
    f"SmolLM2-135M cut to {' and '.join(f'{x:.0%}' for x in LARGE)} of its neurons and heads without "
    "training, bits per byte on 40 kB of held-out text. Text, Llama of 2 blocks and width 64, 500 "
    f"steps, cut to {DENSITY:.0%}, 250 steps more.",
    one,
    promises,
    remark="Trained on with three learning rates, as is the dense network, for as long; the small "
    "network from the start has two and all 750 steps. Of each the best is taken on the same "
    "held-out text. On SmolLM2 dense and magnitude are the same on every seed.",
)
