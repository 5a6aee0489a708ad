"""Timing in turns, and the machine's limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gossamer.core.errors import UsageError
from gossamer.ops._dispatch import isa_index, kernels

Call = Callable[[], object]
_PAUSE, _BURST = 0.06, 0.02


def interleaved(calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
    """Median seconds of each call; all take turns, after one untimed turn each.

    A turn is a pause, in which another engine's idle threads stop spinning, one untimed call, which
    wakes this engine's, and then calls for about 20 ms, whose mean counts.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            taken = _turn(call)
            if repeat:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _turn(call: Call) -> float:
    time.sleep(_PAUSE)
    start = time.perf_counter()
    call()
    count = max(1, int(_BURST / max(1e-7, time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


@dataclass(frozen=True)
class Limits:
    """read: bytes per second from memory; flops: multiply-adds on registers, two flops each."""

    read: float
    flops: float
    threads: int

    def seconds(self, nbytes: float, flops: float) -> tuple[float, str]:
        """The least time that moves so many bytes and does so many flops, and which binds."""
        memory, arithmetic = nbytes / self.read, flops / self.flops
        return (memory, "bytes") if memory >= arithmetic else (arithmetic, "flops")


def measure_limits(megabytes: int = 256) -> Limits:
    """Of this machine with torch's threads: the best of five runs each; about a second."""
    module = kernels()
    if module is None or isa_index() < 0:
        raise UsageError("benchmarks need the compiled kernels; install with a C++ compiler")
    threads = torch.get_num_threads()
    data = torch.ones(megabytes << 18)
    steps = 4_000_000
    calls = {
        "read": lambda: module.read_floats(data.data_ptr(), data.numel(), threads, isa_index()),
        "flops": lambda: module.multiply(steps, threads, isa_index()),
    }
    best = {
        name: min(interleaved({name: call}, 1)[name] for _ in range(5))
        for name, call in calls.items()
    }
    flops = threads * steps * module.FLOPS_PER_STEP
    return Limits(data.nbytes / best["read"], flops / best["flops"], threads)
