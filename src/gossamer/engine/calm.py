"""Whether others use the machine while something is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gossamer.ops._dispatch import isa_index, kernels

CALM = 0.85
"""The share of the machine below which a measurement was disturbed."""


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


@dataclass(frozen=True)
class Watched:
    """Seconds of each round by name, the calm ones first, and how many of them were not calm."""

    seconds: Mapping[str, list[float]]
    disturbed: int


def watched_rounds(
    turn: Callable[[], Mapping[str, float]],
    count: int,
    patience: float,
    after: Callable[[str], None] = lambda label: None,
) -> Watched:
    """The times of `count` rounds, taken while the machine was calm where that can be had.

    A round that others disturbed is taken again, for `patience` seconds and twice `count` rounds at
    most; where too few were calm then, disturbed ones count too. after: called after every round.
    """
    found: list[tuple[bool, Mapping[str, float]]] = []
    end, before = time.monotonic() + patience, calm()
    while True:
        times, now = turn(), calm()
        found.append((min(before, now) < CALM, times))
        before = now
        good = sum(not disturbed for disturbed, _ in found)
        after("" if good == len(found) else f"machine busy in {len(found) - good} of {len(found)}")
        spent = time.monotonic() >= end or len(found) >= 2 * count
        if good >= count or (len(found) >= count and spent):
            break
    found.sort(key=lambda one: one[0])  # stable: among calm rounds the first count
    chosen = found[:count]
    names = chosen[0][1]
    seconds = {name: [times[name] for _, times in chosen] for name in names}
    return Watched(seconds, sum(disturbed for disturbed, _ in chosen))
