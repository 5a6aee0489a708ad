"""Whether others use the machine while something is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gossamer.nn.kernel_choice.timing import CALM, calm


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
