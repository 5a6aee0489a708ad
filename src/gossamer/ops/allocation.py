"""Allocations that rank the weights of all layers together, and the table of all allocations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import (
    ER,
    ERK,
    OWL,
    BlockInfluence,
    ERKPlus,
    LayerInfo,
    Uniform,
    UniformPlus,
)
from gossamer.core.density import check_finite
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Unstructured
from gossamer.ops.select import select_global


@dataclass(frozen=True)
class Global:
    """The densities that one magnitude threshold over all layers leaves."""

    needs: ClassVar[tuple[str, ...]] = ()

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name; raises UsageError when a layer would lose every weight."""
        return _ranked(layers, density, {x.name: x.weight.abs() for x in layers}, "Global")


@dataclass(frozen=True)
class LAMP:
    """Layer-adaptive magnitude: w^2 over the sum of squares not smaller, one global threshold.

    The largest weight of a layer scores 1, so no layer empties before all are down to one weight.

    References
    ----------
    Layer-adaptive Sparsity for the Magnitude-based Pruning (2021).
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name."""
        return _ranked(layers, density, {x.name: lamp_scores(x.weight) for x in layers}, "LAMP")


ALLOCATIONS: dict[str, type] = {
    "uniform": Uniform,
    "uniform+": UniformPlus,
    "er": ER,
    "erk": ERK,
    "erk+": ERKPlus,
    "global": Global,
    "lamp": LAMP,
    "owl": OWL,
    "influence": BlockInfluence,
}


def lamp_scores(weight: Tensor) -> Tensor:
    """w_u^2 / sum over v of w_v^2 with w_v^2 not ranked below w_u^2; ties by index. O(n log n)."""
    squares = weight.detach().double().square().flatten()
    check_finite(squares, "LAMP weight")
    order = torch.argsort(squares, stable=True)
    ranked = squares[order]
    tail = ranked.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = torch.where(tail > 0, ranked / tail, torch.zeros((), dtype=tail.dtype))
    return scores.reshape(weight.shape)


def _ranked(
    layers: Sequence[LayerInfo], density: float, scores: dict[str, Tensor], what: str
) -> dict[str, float]:
    supports = select_global(scores, Unstructured("global"), density)
    densities = {name: support.density for name, support in supports.items()}
    empty = [name for name, value in densities.items() if value == 0]
    if empty:
        raise UsageError(
            f"{what} at density {density:g} would empty {', '.join(empty[:3])}; keep more weights "
            "or exclude those layers"
        )
    return densities
