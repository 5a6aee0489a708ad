"""Masks chosen before training, on the digits, for the claims of the methods that choose them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import gossamer as gs
from gossamer.claims.vision import qualities
from gossamer.ops.select import select_global
from gossamer.testbed.vision import Digits

CONSTANT = 0.1
"""The accuracy of a network with an empty layer, which gives one answer to all ten digits."""


def methods(problem: Digits, density: float) -> dict[str, Any]:
    """Every way to choose a mask before training, by name."""
    return {
        "SynFlow": gs.weights.SynFlow(density),
        "GraSP": gs.weights.GraSP(density),
        "SNIP": gs.weights.SNIP(density),
        "magnitude": magnitude(problem, density),
        "random, ERK": gs.weights.StaticRandom(density),
    }


def magnitude(problem: Digits, density: float) -> gs.weights.FixedMasks:
    """The largest |w| of all layers together, before training."""
    layers = problem.build(problem.split).named_modules()
    scores = {n: m.weight.detach().abs() for n, m in layers if isinstance(m, nn.Linear)}
    supports = select_global(scores, gs.Unstructured("global"), density)
    return gs.weights.FixedMasks({name: support.mask for name, support in supports.items()})


def accuracies(problem: Digits, made: Mapping[str, Any], steps: int) -> dict[str, float]:
    """Held-out accuracy after training; that of a constant where a layer is left without weights."""
    found = {}
    for name, method in made.items():
        try:
            found |= qualities(problem, {name: method}, steps)
        except gs.UsageError as error:
            if "keep more weights" not in str(error):
                raise
            found[name] = CONSTANT
    return found
