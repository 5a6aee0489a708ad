"""Masks chosen before training, on the digits, for the claims of the methods that choose them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import gossamer as gs
from gossamer.claims.vision import qualities
from gossamer.core.allocation import LayerInfo
from gossamer.ops.select import select, select_global
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
        "magnitude, ERK": magnitude(problem, density, gs.ERK()),
        "random, ERK": gs.weights.StaticRandom(density),
    }


def magnitude(
    problem: Digits, density: float, allocation: gs.ERK | None = None
) -> gs.weights.FixedMasks:
    """The largest |w| before training: of all layers together, or of each by an allocation."""
    layers = problem.build(problem.split).named_modules()
    scores = {n: m.weight.detach().abs() for n, m in layers if isinstance(m, nn.Linear)}
    if allocation is None:
        supports = select_global(scores, gs.Unstructured("global"), density)
    else:
        infos = [LayerInfo(n, tuple(x.shape), None, x) for n, x in scores.items()]
        shares = allocation.allocate(infos, density)
        supports = {n: select(x, gs.Unstructured(), shares[n]) for n, x in scores.items()}
    return gs.weights.FixedMasks({name: support.mask for name, support in supports.items()})


def accuracies(problem: Digits, made: Mapping[str, Any], steps: int) -> dict[str, float]:
    """Held-out accuracy after training; that of a constant where a layer is left without weights."""
    found: dict[str, float] = {}
    for name, method in made.items():
        try:
            found |= qualities(problem, {name: method}, steps)
        except gs.UsageError as error:
            if "keep more weights" not in str(error):
                raise
            found[name] = CONSTANT
    return found
