"""Confidence intervals of means: Student's t for any degrees of freedom, in plain Python."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from gossamer.core.errors import UsageError


class Interval(NamedTuple):
    """A mean, and half the width of its confidence interval."""

    mean: float
    half: float


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and half width of its two-sided confidence interval, by Student's t.

    Raises UsageError for fewer than two values, from which no spread follows.
    """
    if len(values) < 2:
        raise UsageError(f"an interval needs at least 2 values, not {len(values)}")
    t = t_quantile((1 + confidence) / 2, len(values) - 1)
    return Interval(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))


@lru_cache(256)
def t_quantile(probability: float, freedom: float) -> float:
    """The t below which Student's distribution of `freedom` degrees has `probability`."""
    if not 0 < probability < 1 or not freedom > 0:
        raise UsageError(
            f"a quantile needs 0 < probability < 1 and degrees of freedom above 0, not "
            f"{probability!r} and {freedom!r}"
        )
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return low


def t_cdf(t: float, freedom: float) -> float:
    """The probability that Student's distribution of `freedom` degrees gives to values up to t."""
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return 1 - tail if t > 0 else tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 < x <= 1."""
    if x >= 1:
        return 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        + a * math.log(x) + b * math.log1p(-x)
    )  # fmt: skip
    # The fraction converges fast on this side of the distribution's centre only.
    if x > (a + 1) / (a + b + 2):
        return 1 - front * _fraction(b, a, 1 - x) / b
    return front * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b), from the front by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
