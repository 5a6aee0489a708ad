"""What the topology methods share: exact counts, and dropping and growing in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import ER, ERK, ERKPlus, LayerInfo, Uniform, UniformPlus
from gossamer.core.budget import TopK
from gossamer.core.density import check_density, check_finite, kept_count
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Pattern, Unstructured
from gossamer.core.step import Step
from gossamer.ops.select import keep

ShapeAllocation = Uniform | UniformPlus | ER | ERK | ERKPlus
"""Allocations that depend on shapes alone, so that they stay the same all through training."""


@dataclass(frozen=True)
class StaticSupport:
    """Defaults of a topology method: no dense weights behind, any weight, a support that stays."""

    keeps_dense_weights: ClassVar[bool] = False
    trains_scales: ClassVar[bool] = False

    @property
    def pattern(self) -> Pattern:
        """Any weight."""
        return Unstructured()

    def due(self, step: int, total: int) -> bool:
        """Never."""
        return False

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The same support."""
        return [dict(step.masks)]


def every_weight(layers: Sequence[LayerInfo]) -> dict[str, Tensor]:
    """Masks that leave nothing out: where a dense-to-sparse method starts."""
    return {x.name: torch.ones_like(x.weight, dtype=torch.bool) for x in layers}


def layer_counts(
    layers: Sequence[LayerInfo], allocation: ShapeAllocation, density: float
) -> dict[str, int]:
    """Weights to keep in each layer; together exactly the nearest whole number to the budget.

    Largest remainders are rounded up. Raises UsageError when a layer would keep none.
    """
    check_density(density)
    if not isinstance(allocation, ShapeAllocation):
        raise UsageError(f"{type(allocation).__name__} depends on weights; choose Uniform, "
                         "UniformPlus, ER, ERK or ERKPlus")  # fmt: skip
    shares = allocation.allocate(layers, density)
    exact = {layer.name: shares[layer.name] * layer.size for layer in layers}
    # A hair more, so that 0.1 * 30 is 3 whichever way it was rounded.
    counts = {name: int(value + 1e-6) for name, value in exact.items()}
    left = kept_count(sum(x.size for x in layers), density) - sum(counts.values())
    size = {layer.name: layer.size for layer in layers}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name]):
        if left > 0 and counts[name] < size[name]:
            counts[name] += 1
            left -= 1
    for name, count in counts.items():
        if count == 0:
            raise UsageError(
                f"{name}: density {density:g} leaves no weight of {size[name]}; keep more weights "
                "or exclude this layer"
            )
    return counts


def random_masks(
    layers: Sequence[LayerInfo], counts: Mapping[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks with exactly `counts` weights at uniformly random places."""
    masks = {}
    for x in layers:
        scores = random_like(x.weight, generator)
        masks[x.name] = highest(scores, torch.ones_like(scores, dtype=torch.bool), counts[x.name])
    return masks


def random_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform float64 numbers of the weight's shape, on its device, drawn on the CPU."""
    numbers = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    return numbers.to(weight.device)


def highest(scores: Tensor, among: Tensor, count: int, name: str = "weights") -> Tensor:
    """The mask of the `count` highest scores of `among`, fewer where it has fewer.

    Raises NonFiniteError, naming the layer, for a score that is NaN or infinite.
    """
    check_finite(scores, name)
    ranked = scores.masked_fill(~among, -torch.inf)
    return keep(ranked.reshape(-1), TopK(count)).reshape(scores.shape)


def derivatives(
    value: Tensor, weights: Mapping[str, Tensor], graph: bool = False
) -> dict[str, Tensor]:
    """The derivatives of a scalar by layer; with `graph` they can be differentiated again.

    Raises UsageError, naming the layer, where it does not depend on a weight.
    """
    found = torch.autograd.grad(
        value, list(weights.values()), create_graph=graph, allow_unused=True
    )
    slopes = {}
    for name, slope in zip(weights, found, strict=True):
        if slope is None:
            raise UsageError(f"{name}: the loss does not depend on it; exclude it")
        slopes[name] = slope
    return slopes


def without_smallest(
    values: Tensor, fraction: float, rounded: Callable[[float], int] = math.floor
) -> Tensor:
    """bool (nnz,): kept weights less the fraction, `rounded` to a count, of the smallest |w|."""
    count = values.numel() - rounded(fraction * values.numel())
    return highest(values.abs(), torch.ones_like(values, dtype=torch.bool), count)


def rewire(
    layers: Sequence[LayerInfo],
    masks: Mapping[str, Tensor],
    survivors: Callable[[Tensor], Tensor],
    growth: Callable[[LayerInfo], Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What stays in each layer, and that with as many weights grown as did not.

    `survivors` gives bool (nnz,) for a layer's kept weights, in row order. Those grow that have the
    highest `growth(layer)` (out, in), among all that did not survive.
    """
    kept, grown = {}, {}
    for x in layers:
        mask = masks[x.name]
        values = x.weight[mask]
        check_finite(values, x.name)
        stay = torch.zeros_like(mask)
        stay[mask] = survivors(values)
        room = values.numel() - int(stay.sum())
        kept[x.name] = stay
        grown[x.name] = stay | highest(growth(x), ~stay, room, x.name)
    return kept, grown


def drop_and_regrow(
    layers: Sequence[LayerInfo],
    gradients: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    survivors: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The masks after `rewire` by the largest |dense gradient|. What was just dropped may grow
    back."""
    return rewire(layers, masks, survivors, lambda x: gradients[x.name].abs())[1]


def check_every(every: int, what: str) -> None:
    """Raise UsageError unless `every` is a whole number of at least 1."""
    check_whole(every, f"{what}: every, in steps,")


def check_whole(number: int, what: str) -> None:
    """Raise UsageError unless `number` is a whole number of at least 1."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UsageError(f"{what} is a whole number of at least 1, not {number!r}")


def check_fraction(value: float, what: str) -> None:
    """Raise UsageError unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{what} is a fraction in [0, 1], not {value!r}")


def check_phase(begin: float, end: float, what: str) -> None:
    """Raise UsageError unless both are fractions of a run, in order."""
    check_fraction(begin, "begin")
    check_fraction(end, "end")
    if begin > end:
        raise UsageError(f"{what} needs begin <= end, not {begin:g} and {end:g}")
