"""How one sparsity of a block becomes one per layer: TEAL's greedy allocation."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

Error = Callable[[Mapping[str, float]], float]
"""Of a block's output, when its layers have these sparsities."""


@dataclass(frozen=True)
class Greedy:
    """The steps of one block: (layer, its sparsity, error, mean sparsity), and where they ended."""

    steps: tuple[tuple[str, float, float, float], ...]
    sparsity: dict[str, float]


def greedy(
    costs: Mapping[str, float], error: Error, step: float, target: float, most: float = 1.0
) -> Greedy:
    """Make the layer sparser whose step hurts the block's output least, until the mean is reached.

    A step adds step / cost to a layer, so that every step saves equally many weights. An error that
    was measured before other layers became sparser is a lower bound, as errors grow with sparsity.
    So layers are tried again in the order of these bounds, and only until none can be better.

    costs: by layer, in proportion to their weights. most: a layer that has reached it is left.
    """
    total = sum(costs.values())
    sparsity = dict.fromkeys(costs, 0.0)
    order = {name: place for place, name in enumerate(costs)}
    heap = [(-1.0, order[name], name) for name in costs]
    heapq.heapify(heap)
    steps: list[tuple[str, float, float, float]] = []
    mean = 0.0
    while mean < target - 1e-12 and heap:
        found = _best(heap, sparsity, costs, error, step, most)
        if found is None:
            break
        value, name = found
        sparsity[name] = min(sparsity[name] + step / costs[name], most)
        mean = sum(costs[each] * sparsity[each] for each in costs) / total
        steps.append((name, sparsity[name], value, mean))
        heapq.heappush(heap, (value, order[name], name))
    return Greedy(tuple(steps), sparsity)


def _best(
    heap: list[tuple[float, int, str]],
    sparsity: Mapping[str, float],
    costs: Mapping[str, float],
    error: Error,
    step: float,
    most: float,
) -> tuple[float, str] | None:
    """The layer with the smallest error after one more step, taken off the heap."""
    fresh: set[str] = set()
    while heap:
        value, place, name = heapq.heappop(heap)
        if sparsity[name] >= most - 1e-12:
            continue
        if name in fresh:
            return value, name
        more = min(sparsity[name] + step / costs[name], most)
        heapq.heappush(heap, (error({**sparsity, name: more}), place, name))
        fresh.add(name)
    return None


def activation_error(dense: Tensor, sparse: Tensor) -> float:
    """How far a block's output (batch, positions, width) is off over the last quarter of positions:
    the norm over positions, averaged over texts and channels."""
    last = max(1, dense.shape[-2] // 4)
    away = (dense - sparse)[..., -last:, :].float()
    return float(away.norm(dim=-2).mean())


def proportional(sizes: Mapping[str, int], names: Iterable[str]) -> dict[str, float]:
    """Costs of layers by their weights, as multiples of the first one's."""
    chosen = list(names)
    return {name: sizes[name] / sizes[chosen[0]] for name in chosen}
