"""Quality against what attention costs: points, their means, equal densities, the Pareto front and a
fit over models, lengths and densities, after The Sparse Frontier (2025)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import fmean

import torch

from gossamer.core.errors import UsageError

DENSE = "dense"
"""The method of points with every pair."""


@dataclass(frozen=True)
class Point:
    """One prompt, or the mean over some.

    Attributes
    ----------
    model, method, setting, task : str
        `dense` is the method of every pair.
    length, seed : int
        Tokens of the prompt, and which one it was; -1 for a mean.
    parameters : int
        Of the model.
    score : float
        Of the task.
    density : float
        Measured: computed pairs over those that may be attended.
    linear, attention, indexing : float
        Operations of the prefill: of linear layers, of the chosen pairs, of choosing them.
    decode_bytes : float
        What one new token behind the prompt reads: weights, keys and values, and an index.
    seconds : float
        Processor time of the prefill.
    """

    model: str
    method: str
    setting: str
    task: str
    length: int
    seed: int
    parameters: int
    score: float
    density: float
    linear: float
    attention: float
    indexing: float
    decode_bytes: float
    seconds: float

    @property
    def flops(self) -> float:
        """Of the whole prefill."""
        return self.linear + self.attention + self.indexing


_MEASURED = [x.name for x in fields(Point) if x.type == "float"]


def mean(points: Sequence[Point], **changed: str | int) -> Point:
    """One point with the mean of all that was measured."""
    found = {name: fmean(getattr(point, name) for point in points) for name in _MEASURED}
    return replace(points[0], seed=-1, **found, **changed)  # type: ignore[arg-type]


def means(points: Iterable[Point], over: Sequence[str] = ("seed",)) -> list[Point]:
    """Means over some of `seed`, `task` and `length`, in the order of what is left."""
    kept = [name for name in ("model", "method", "setting", "task", "length", "seed")
            if name not in over]  # fmt: skip
    groups: dict[tuple[object, ...], list[Point]] = defaultdict(list)
    for point in points:
        groups[tuple(getattr(point, name) for name in kept)].append(point)
    changed: dict[str, str | int] = {"task": "all tasks"} if "task" in over else {}
    return [mean(group, **changed) for group in groups.values()]


def at_density(
    points: Iterable[Point], density: float, value: Callable[[Point], float] | None = None
) -> float | None:
    """The score, or another value, of one method at a density, between its neighbours on a log scale.

    points: settings of one method and task, with the dense point where it shall be the upper end.
    None outside of the measured densities, for nothing is extrapolated.
    """
    value = value or (lambda point: point.score)
    known = sorted(((point.density, value(point)) for point in points), key=lambda one: one[0])
    if not known or not known[0][0] <= density <= known[-1][0]:
        return None
    for (low, before), (high, after) in pairwise(known):
        if low <= density <= high and high > low:
            share = math.log(density / low) / math.log(high / low)
            return before + share * (after - before)
    return known[0][1] if density == known[0][0] else known[-1][1]


def pareto(points: Iterable[Point], cost: Callable[[Point], float], better: str) -> list[Point]:
    """Those that no other point beats in cost without losing quality, from the cheapest on."""
    sign = 1 if better == "higher" else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (cost(one), -sign * one.score)):
        if not front or sign * point.score > sign * front[-1].score:
            front.append(point)
    return front


@dataclass(frozen=True)
class Law:
    """logit(score) = constant + size log N + length log n + sparsity log 1/(1 - s), for one task.

    Attributes
    ----------
    constant, size, length, sparsity : float
        Coefficients; 0 of what did not vary. 1 - s is the density.
    fitted, held_out : int
        Points that it was fitted to, and extremes that it was not.
    residual, held_out_residual : float
        Root mean squares of score minus prediction.
    spread : float
        Root mean square of the held-out scores about their mean: what a constant would leave.
    """

    constant: float
    size: float
    length: float
    sparsity: float
    fitted: int
    held_out: int
    residual: float
    held_out_residual: float
    spread: float


def fit(points: Sequence[Point], least: float = 0.5, ridge: float = 1e-3) -> Law:
    """Fit one task's scores, in [0, 1], without the extremes: the largest model, the longest prompts
    and the lowest tenth of densities, where each varies and something is left.

    least: how many right answers a score is moved away from 0 and 1, of `1 / least` hundred. ridge:
    of the coefficients. Raises UsageError for fewer than four points to fit.
    """
    edge = least / 100
    rows = [_row(point) for point in points]
    centre = torch.tensor(rows).double().mean(0)
    inner = [not extreme for extreme in _extremes(points)]
    if sum(inner) < 4:
        raise UsageError(f"a fit needs 4 points besides the extremes, not {sum(inner)}")
    x = torch.cat([torch.ones(len(rows), 1).double(), torch.tensor(rows).double() - centre], dim=1)
    score = torch.tensor([point.score for point in points]).double()
    y = torch.logit(score.clamp(edge, 1 - edge))
    mask = torch.tensor(inner)
    penalty = ridge * torch.eye(4, dtype=torch.double)
    penalty[0, 0] = 0
    a = x[mask].T @ x[mask] + penalty
    weights = torch.linalg.solve(a, x[mask].T @ y[mask])
    rest = (score - torch.sigmoid(x @ weights)).square()
    out = score[~mask]
    size, length, sparsity = weights[1:].tolist()
    return Law(
        float(weights[0] - weights[1:] @ centre), size, length, sparsity, int(mask.sum()), len(out),
        float(rest[mask].mean().sqrt()), float(rest[~mask].mean().sqrt()) if len(out) else 0.0,
        float(out.std(correction=0)) if len(out) else 0.0,
    )  # fmt: skip


def _row(point: Point) -> list[float]:
    return [math.log(point.parameters), math.log(point.length), -math.log(point.density)]


def _extremes(points: Sequence[Point]) -> list[bool]:
    """Whether each point is the largest model, the longest prompt or of the lowest densities."""
    sizes, lengths = {p.parameters for p in points}, {p.length for p in points}
    densities = sorted(p.density for p in points)
    lowest = densities[len(densities) // 10]
    return [
        (len(sizes) > 2 and p.parameters == max(sizes))
        or (len(lengths) > 2 and p.length == max(lengths))
        or p.density <= lowest
        for p in points
    ]
