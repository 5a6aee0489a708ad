"""Timing layers: copies that take turns, bursts of calls, and whether the machine is ours."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels

Call = Callable[[Tensor], Tensor]
CALM = 0.85
"""The share of the machine below which a measurement was disturbed."""
_COLD, _COPIES = 64 << 20, 16
_BURST, _ROUNDS = 3e-4, 4


def random_matrix(out: int, inputs: int, density: float, high: int = 1) -> Tensor:
    """Normal numbers (out, inputs), `high` neighbouring rows of which keep the same columns."""
    matrix, rows = torch.randn(out, inputs), -(-out // high)
    dropped = (torch.rand(rows, inputs) > density).repeat_interleave(high, 0)
    return matrix.masked_fill_(dropped[:out], 0.0)


def copies(layer: Any, cold: int = _COLD) -> list[Any]:
    """The layer and copies of it, of so many bytes together, or so many, that take turns.

    So weights of large models come from memory as they do when such a model runs.
    """
    weights = (*layer.parameters(), *layer.buffers())
    nbytes = sum(weight.nbytes for weight in weights)
    count = max(1, min(_COPIES, cold // max(1, nbytes)))
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def burst(turn: Iterator[Call], x: Tensor, count: int) -> float:
    """Mean seconds of so many calls."""
    start = time.perf_counter()
    for _ in range(count):
        next(turn)(x)
    return max(1e-9, (time.perf_counter() - start) / count)


def in_turns(layers: Mapping[str, list[Any]], x: Tensor, patience: float) -> dict[str, float]:
    """The least mean seconds of a call of each: what else runs can only add to it.

    Bursts of all take turns, at least four of each and for `patience` seconds.
    """
    turns = {name: itertools.cycle(each) for name, each in layers.items()}
    least = {name: burst(turn, x, 1) for name, turn in turns.items()}
    end = time.perf_counter() + patience
    rounds = 0
    while rounds < _ROUNDS or time.perf_counter() < end:
        for name, turn in turns.items():
            count = max(1, min(20, int(_BURST / least[name])))
            least[name] = min(least[name], burst(turn, x, count))
        rounds += 1
    return least


def calm(peak: float = 0.0) -> float:
    """How much of the machine is ours: flops of all threads over what they could be.

    That is those of one thread times their number, or `peak` flops per second where it is more: 0.5
    where two threads share a core or wait for others' work. Takes some 20 ms.
    """
    threads = torch.get_num_threads()
    if kernels() is None or isa_index() < 0:
        return 1.0
    return min(1.0, rate(threads) / max(peak, threads * rate(1)))


def rate(threads: int) -> float:
    """Flops per second on registers, the median of three runs of some milliseconds."""
    module: Any = kernels()
    steps, times = 1_000_000, []
    for _ in range(3):
        start = time.perf_counter()
        module.multiply(steps, threads, isa_index())
        times.append(time.perf_counter() - start)
    return float(threads * steps * module.FLOPS_PER_STEP) / statistics.median(times)
