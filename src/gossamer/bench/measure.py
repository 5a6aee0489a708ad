"""Timing in turns, and the machine's limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gossamer.core.errors import UsageError
from gossamer.nn.kernel_choice.timing import CALM, calm, rate
from gossamer.ops._dispatch import isa_index, kernels

Call = Callable[[], object]
_PAUSE, _BURST = 0.06, 0.02
_TRIES = 3


@dataclass(frozen=True)
class Repeats:
    """How many turns every engine takes, and how long to wait for rounds that nobody disturbs.

    peak: flops per second that all threads reach on an idle machine, as far as known.
    """

    count: int
    patience: float = 0.0
    peak: float = 0.0


@dataclass(frozen=True)
class Turns:
    """Median seconds of each call, and the least that `calm` said of the rounds that count.

    calm is None where nobody watched.
    """

    seconds: dict[str, float]
    calm: float | None

    def record(self, case: Any, bound: tuple[float, str], rivals: str = "dense") -> dict[str, Any]:
        """What every suite reports of a case; `bound` from `Limits.seconds`.

        The ratio is to the fastest engine with `rivals` in its name.
        """
        ours, (least, binds) = self.seconds["gossamer"], bound
        others = {n: taken for n, taken in self.seconds.items() if rivals in n and n != "gossamer"}
        best = min(others, key=lambda name: others[name])
        watched = {} if self.calm is None else {"calm": round(self.calm, 3)}
        return {
            "case": vars(case),
            "milliseconds": {name: 1e3 * taken for name, taken in self.seconds.items()},
            "best_dense": best,
            "ratio": others[best] / ours,
            "fraction_of_limit": least / ours,
            "limit": binds,
            **watched,
        }


def interleaved(calls: Mapping[str, Call], rounds: Repeats | int) -> Turns:
    """Times of the calls, which take turns, after one untimed turn each.

    A turn is a pause, in which another engine's idle threads stop spinning, one untimed call, which
    wakes this engine's, and then calls for about 20 ms, whose mean counts. With patience, rounds
    before or after which the machine was not calm do not count, whatever they say, as long as the
    patience lasts; if too few are left then, the calmest count.
    """
    rounds = Repeats(rounds) if isinstance(rounds, int) else rounds
    for call in calls.values():
        _turn(call)
    end = time.monotonic() + rounds.patience
    found: list[tuple[float, dict[str, float]]] = []
    wanted, before = rounds.count, calm(rounds.peak) if rounds.patience else 1.0
    while wanted:
        times = {name: _turn(call) for name, call in calls.items()}
        after = calm(rounds.peak) if rounds.patience else 1.0
        found.append((min(before, after), times))
        wanted -= found[-1][0] >= CALM or time.monotonic() >= end
        before = after
    found.sort(key=lambda one: -min(one[0], CALM))  # stable: among calm rounds the first count
    chosen = found[: rounds.count]
    medians = {name: statistics.median(times[name] for _, times in chosen) for name in calls}
    return Turns(medians, min(least for least, _ in chosen) if rounds.patience else None)


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


def measure_limits(megabytes: int = 256, patience: float = 0.0) -> Limits:
    """Of this machine with torch's threads: the best of five runs each; about a second.

    With patience, again for so many seconds at most, until nobody disturbs and all threads together
    reach what one does times their number; the best of all counts.
    """
    best, end = _best_of_five(megabytes), time.monotonic() + patience
    while time.monotonic() < end:
        if calm(best.flops) >= CALM and best.flops >= CALM * best.threads * rate(1):
            break
        time.sleep(0.5)
        more = _best_of_five(megabytes)
        best = Limits(max(best.read, more.read), max(best.flops, more.flops), best.threads)
    return best


def _best_of_five(megabytes: int) -> Limits:
    module = kernels()
    if module is None or isa_index() < 0:
        raise UsageError("benchmarks need the compiled kernels; install with a C++ compiler")
    threads = torch.get_num_threads()
    data = torch.ones(megabytes << 18)
    steps = 4_000_000
    calls = {
        "read": lambda: module.read_floats(data, threads, isa_index()),
        "flops": lambda: module.multiply(steps, threads, isa_index()),
    }
    best = {
        name: min(interleaved({name: call}, 1).seconds[name] for _ in range(5))
        for name, call in calls.items()
    }
    flops = threads * steps * module.FLOPS_PER_STEP
    return Limits(data.nbytes / best["read"], flops / best["flops"], threads)


def when_calm(
    measure: Callable[[], dict[str, Any]], patience: float, peak: float = 0.0
) -> dict[str, Any]:
    """The result of `measure`, taken while nobody else used the machine, with `calm` in it.

    Waits for such a moment, for `patience` seconds in all, and measures again, at most three times,
    where the machine was not calm at the end either. The calmest measurement counts, whatever it
    says; 0 seconds measures once, at once.
    """
    found: list[dict[str, Any]] = []
    end = time.monotonic() + patience
    while True:
        while (before := calm(peak)) < CALM and time.monotonic() < end:
            time.sleep(0.5)
        result = measure()
        found.append({**result, "calm": round(min(before, calm(peak)), 3)})
        if found[-1]["calm"] >= CALM or len(found) == _TRIES or time.monotonic() >= end:
            return max(found, key=lambda one: float(one["calm"]))
