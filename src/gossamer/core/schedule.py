"""Schedules: a density, drop fraction or temperature as a pure function of progress in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gossamer.core.errors import UsageError


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        _check(progress)
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end`."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        _check(progress)
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cubic:
    """Fast first, slow last: end + (start - end)(1 - p)^3 (To prune, or not to prune, 2017)."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        _check(progress)
        return self.end + (self.start - self.end) * (1.0 - progress) ** 3


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end` (the drop fraction of RigL, 2020, with end 0)."""

    start: float
    end: float = 0.0

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        _check(progress)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _check(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise UsageError(f"progress runs from 0 to 1, not {progress}")
