"""The density from which reading all columns is faster, timed on the model's own weights."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.engine.inputs.activations.layer_plan import LayerPlan
from gossamer.ops import _dispatch
from gossamer.ops.active import native, reference

_LOW, _HIGH = 0.25, 0.75
_ROUNDS = 5
_ENOUGH = 64 << 20
"""Bytes of weights that take turns, so that none stays in a cache."""


def stay_dense(
    plans: Mapping[str, LayerPlan], layers: Mapping[str, nn.Linear], break_even: float | None
) -> dict[str, str]:
    """Layers that run faster as they are, each with the reason."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        if plans[name].state.density < 1:
            alike[tuple(layer.weight.shape), layer.weight.dtype].append(name)
    limits = {
        key: timed([layers[name].weight for name in names]) if break_even is None else break_even
        for key, names in alike.items()
    }
    shares = _rotation_shares(plans)
    found = {}
    for key, names in alike.items():
        for name in names:
            each = plans[name]
            read = _read(each) + shares.get(name, 0.0)
            if read >= limits[key]:
                found[name] = (
                    f"dense: reading {read:.2f} of it is slower, break-even {limits[key]:.2f}"
                )
    return found


def _read(each: LayerPlan) -> float:
    """The fraction of a layer's weights that a token reads, the low-rank part included."""
    rest = sum(part.numel() for part in each.state.bypass or ())
    return each.state.density + rest / (each.shape[0] * each.shape[1])


def _rotation_shares(plans: Mapping[str, LayerPlan]) -> dict[str, float]:
    """What the rotation in front of a layer adds to what it reads, as a fraction of its weights."""
    groups: dict[int, list[LayerPlan]] = defaultdict(list)
    for each in plans.values():
        if each.rotation is not None:
            groups[id(each.rotation)].append(each)
    found = {}
    for group in groups.values():
        total = sum(each.shape[0] * each.shape[1] for each in group)
        extra = group[0].rotation.numel() if group[0].rotation is not None else 0
        found.update({each.name: extra / total for each in group})
    return found


def timed(weights: Sequence[Tensor]) -> float:
    """Of weights (out, in) of one shape and dtype on the CPU, from 0 to 1; for one token.

    The time of the kernel is taken as linear in the density, from two densities. Memory is read as
    columns whatever it holds, so nothing is copied. Takes turns; medians.
    """
    out, width = weights[0].shape
    count = max(1, min(len(weights), _ENOUGH // max(1, weights[0].nbytes) + 1))
    some = [weight.detach() for weight in weights[:count]]
    x = torch.ones(1, width, dtype=weights[0].dtype)
    backend = _dispatch.backend(reference, native)
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: [functional.linear(x, weight) for weight in some]
    }
    for name, share in (("low", _LOW), ("high", _HIGH)):
        index = torch.linspace(0, width - 1, max(1, round(share * width))).to(torch.int32)

        def skip(index: Tensor = index) -> object:
            return [
                backend.linear(x[0], weight.view(width, out), None, None, index, 0.0)
                for weight in some
            ]

        calls[name] = skip
    with torch.no_grad():
        seconds = _medians(calls)
    slope = (seconds["high"] - seconds["low"]) / (_HIGH - _LOW)
    start = seconds["low"] - _LOW * slope
    if slope <= 0:
        return 1.0 if seconds["high"] < seconds["dense"] else 0.0
    return min(1.0, max(0.0, (seconds["dense"] - start) / slope))


def _medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}
