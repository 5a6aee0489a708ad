"""What the topology methods share: exact counts, and dropping and growing in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import ER, ERK, ERKPlus, LayerInfo, Uniform, UniformPlus
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Pattern, Unstructured
from gossamer.core.select import check_density, kept_count
from gossamer.core.step import Step
from gossamer.ops.statistics import top_mask

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
    return {x.name: top(random_like(x.weight, generator), counts[x.name]) for x in layers}


def random_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform float64 numbers of the weight's shape, on its device, drawn on the CPU."""
    numbers = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    return numbers.to(weight.device)


def top(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest scores of a tensor; ties keep the lower index."""
    return top_mask(scores.reshape(1, -1), count).reshape(scores.shape)


def top_among(scores: Tensor, eligible: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest scores among eligible places, and of no other place."""
    ranked = scores.masked_fill(~eligible, -torch.inf)
    return top(ranked, min(count, int(eligible.sum()))) & eligible


def keep_largest(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """The `count` largest |w| among the kept weights."""
    return top_among(weight.abs(), mask, count)


def without_smallest(weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The mask less the fraction `fraction` of its weights with the smallest |w|."""
    count = int(mask.sum())
    return keep_largest(weight, mask, count - int(fraction * count))


def drop_and_regrow(
    layers: Sequence[LayerInfo],
    gradients: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    fraction: float,
    rounded: Callable[[float], int] = math.floor,
) -> dict[str, Tensor]:
    """In each layer drop `fraction` of the kept weights, `rounded`, smallest |w| first, and grow
    as many by the largest |dense gradient| outside. What was just dropped may grow back."""
    grown = {}
    for layer in layers:
        mask = masks[layer.name]
        count = int(mask.sum())
        room = rounded(fraction * count)
        kept = keep_largest(layer.weight, mask, count - room)
        grown[layer.name] = kept | top_among(gradients[layer.name].abs(), ~kept, room)
    return grown


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
