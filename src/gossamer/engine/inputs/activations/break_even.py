"""The density from which reading all columns is faster, timed on the model's own weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.ops import _dispatch
from gossamer.ops.active import native, reference

_LOW, _HIGH = 0.25, 0.75
_ROUNDS = 5
_ENOUGH = 64 << 20
"""Bytes of weights that take turns, so that none stays in a cache."""


def break_even(weights: Sequence[Tensor]) -> float:
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
