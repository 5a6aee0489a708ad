"""Budgets: how many units are kept per input, along the last dimension of their scores.

Budgets are immutable data, beside patterns, which say what may be zero in a stored weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from gossamer.core.errors import UsageError


@dataclass(frozen=True)
class TopK:
    """The `k` highest scores of each row.

    Parameters
    ----------
    k : int
        How many, from 0. A row with fewer units keeps all it has.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0:
            raise UsageError(f"TopK: k is a whole number from 0, not {self.k!r}")


@dataclass(frozen=True)
class TopP:
    """The fewest highest scores whose sum reaches the share `p` of the row's sum.

    The unit that crosses the share is kept. Scores are masses, such as probabilities: give logits
    through softmax. A negative score has no mass.

    Parameters
    ----------
    p : float
        The share, 0 < p <= 1.
    """

    p: float

    def __post_init__(self) -> None:
        _check_share(self.p, "TopP: p")


@dataclass(frozen=True)
class Threshold:
    """Every score above `value`; a score equal to it is not kept.

    Parameters
    ----------
    value : float
        In the unit of the scores; finite.
    """

    value: float

    def __post_init__(self) -> None:
        _check_number(self.value, "Threshold: value")


@dataclass(frozen=True)
class Fraction:
    """The same fraction of each row, highest scores first.

    The count is the nearest whole number to `fraction` times the length, halves upward.

    Parameters
    ----------
    fraction : float
        Of the units of a row, 0 < fraction <= 1.
    """

    fraction: float

    def __post_init__(self) -> None:
        _check_share(self.fraction, "Fraction: fraction")


@dataclass(frozen=True)
class BatchTopK:
    """The `k` highest scores per row on average, ranked over all rows together.

    The count over all rows is k times their number, rounded down, as in the SAE literature.

    Parameters
    ----------
    k : float
        How many per row on average, from 0; need not be whole.
    """

    k: float

    def __post_init__(self) -> None:
        _check_number(self.k, "BatchTopK: k")
        if self.k < 0:
            raise UsageError(f"BatchTopK: k is a number from 0, not {self.k!r}")


Budget: TypeAlias = TopK | TopP | Threshold | Fraction | BatchTopK


def _check_number(value: float, what: str) -> None:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not math.isfinite(value):
        raise UsageError(f"{what} is a finite number, not {value!r}")


def _check_share(value: float, what: str) -> None:
    _check_number(value, what)
    if not 0 < value <= 1:
        raise UsageError(f"{what} is a fraction in (0, 1], not {value!r}")
