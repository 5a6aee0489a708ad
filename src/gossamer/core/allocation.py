"""Allocations: how one density over the model becomes one density per layer.

Every allocation meets the budget: sum of density_l * size_l equals density * sum of size_l.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.select import check_density, check_finite, select_global


@dataclass(frozen=True, eq=False)
class LayerInfo:
    """A layer as allocations see it.

    shape: of the original weight (a convolution's is 4-d). weight: (out, in). block: index of the
    transformer block. norm: (in,) 2-norms of the dense model's calibration inputs, or None.
    state: the tensors that a training method keeps for the layer, by names of its own.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None
    weight: Tensor
    norm: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.weight.numel()


@dataclass(frozen=True)
class Uniform:
    """The same density everywhere."""

    needs_norm: ClassVar[bool] = False

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name."""
        density = check_density(density)
        return {layer.name: density for layer in layers}


@dataclass(frozen=True)
class UniformPlus:
    """First convolution dense, last layer at least `last`, the rest uniform.

    Without a convolution only the last layer is special. UsageError is raised when those layers
    alone exceed the budget.

    Parameters
    ----------
    last : float
        The least density of the last layer.

    References
    ----------
    The State of Sparsity in Deep Neural Networks (2019).
    """

    last: float = 0.2
    needs_norm: ClassVar[bool] = False

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name."""
        density = check_density(density)
        if len(layers) < 2:
            return {layer.name: density for layer in layers}
        fixed: dict[str, float] = {}
        if len(layers[0].shape) == 4:
            fixed[layers[0].name] = 1.0
        solved = _fill(layers, density, fixed, lambda layer: 1.0)
        if solved[layers[-1].name] >= self.last:
            return solved
        fixed[layers[-1].name] = self.last
        return _fill(layers, density, fixed, lambda layer: 1.0)


@dataclass(frozen=True)
class ER:
    """Density proportional to (n_in + n_out) / (n_in n_out), kernel size left out.

    References
    ----------
    Scalable training of artificial neural networks with adaptive sparse connectivity (2018).
    """

    needs_norm: ClassVar[bool] = False

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name; layers that would exceed 1 are dense and the rest re-solved."""
        return _fill(layers, check_density(density), {}, lambda layer: _erdos(layer.shape[:2]))


@dataclass(frozen=True)
class ERK:
    """Erdos-Renyi-Kernel: (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w).

    It equals ER for linear layers.

    References
    ----------
    Rigging the Lottery: Making All Tickets Winners (2020).
    """

    needs_norm: ClassVar[bool] = False

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name; layers that would exceed 1 are dense and the rest re-solved."""
        return _fill(layers, check_density(density), {}, lambda layer: _erdos(layer.shape))


@dataclass(frozen=True)
class ERKPlus:
    """The last layer at density `last`, ERK over the others under the budget that is left.

    UsageError is raised where the last layer alone uses up the budget, or leaves too much of it.

    Parameters
    ----------
    last : float
        The density of the last layer, in (0, 1].

    References
    ----------
    The Unreasonable Effectiveness of Random Pruning (2022).
    """

    last: float = 1.0
    needs_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_density(self.last)

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name; other layers that would exceed 1 are dense, as with ERK."""
        density = check_density(density)
        if len(layers) < 2:
            return {layer.name: density for layer in layers}
        fixed = {layers[-1].name: self.last}
        left = density * sum(x.size for x in layers) - self.last * layers[-1].size
        if left > sum(x.size for x in layers[:-1]) * (1 + 1e-9):
            raise UsageError(
                f"{layers[-1].name}: density {density:g} cannot be met with the last layer at "
                f"{self.last:g}; raise `last` or choose ERK"
            )
        return _fill(layers, density, fixed, lambda layer: _erdos(layer.shape))


@dataclass(frozen=True)
class Global:
    """The densities that one magnitude threshold over all layers leaves."""

    needs_norm: ClassVar[bool] = False

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

    needs_norm: ClassVar[bool] = False

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name."""
        return _ranked(layers, density, {x.name: lamp_scores(x.weight) for x in layers}, "LAMP")


@dataclass(frozen=True)
class OWL:
    """Outlier-weighed layer-wise density over transformer blocks.

    A block's share is that of its Wanda scores above `m` times their mean. Shares are rescaled to a
    range of 2 `lam`, and shifted to the mean of the budget. More outliers, more weights kept. A
    layer outside blocks is a block of its own.

    Two things are ours. The mean is weighted by size, so that unequal blocks meet the budget
    exactly. A block that would leave [density / 10, 1] stops there, and the others make up for it.

    Parameters
    ----------
    m : float
        How many times the mean an outlier is.
    lam : float
        Half the range of densities.

    References
    ----------
    Outlier Weighed Layerwise Sparsity (2023).
    """

    m: float = 5.0
    lam: float = 0.08
    needs_norm: ClassVar[bool] = True

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name; raises UsageError without norms."""
        density = check_density(density)
        blocks: dict[object, list[LayerInfo]] = {}
        for layer in layers:
            key = layer.name if layer.block is None else layer.block
            blocks.setdefault(key, []).append(layer)
        outliers = {key: self.outlier_share(members) for key, members in blocks.items()}
        low, high = min(outliers.values(), default=0.0), max(outliers.values(), default=0.0)
        if high == low:
            return {layer.name: density for layer in layers}
        raised = {k: 2 * self.lam * (d - low) / (high - low) for k, d in outliers.items()}
        sizes = {key: sum(x.size for x in members) for key, members in blocks.items()}
        shifted = _centred(raised, sizes, density)
        block_of = {layer.name: key for key, members in blocks.items() for layer in members}
        return {layer.name: shifted[block_of[layer.name]] for layer in layers}

    def outlier_share(self, members: Sequence[LayerInfo]) -> float:
        """The share of |w| * norm above m times their mean, over all layers of a block."""
        scores = []
        for layer in members:
            if layer.norm is None:
                raise UsageError(f"{layer.name}: OWL needs the norms of its inputs")
            scores.append((layer.weight.float().abs() * layer.norm.float()).flatten())
        joined = torch.cat(scores)
        return float((joined > self.m * joined.mean()).double().mean())


ALLOCATIONS: dict[str, type] = {
    "uniform": Uniform,
    "uniform+": UniformPlus,
    "er": ER,
    "erk": ERK,
    "erk+": ERKPlus,
    "global": Global,
    "lamp": LAMP,
    "owl": OWL,
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


def _centred(
    raised: Mapping[object, float], sizes: Mapping[object, int], density: float
) -> dict[object, float]:
    """raised + c, cut to [density / 10, 1], with c such that the sized mean is the density."""
    total = sum(sizes.values())

    def cut(c: float) -> dict[object, float]:
        return {key: min(1.0, max(density / 10, value + c)) for key, value in raised.items()}

    def mean(c: float) -> float:
        return sum(value * sizes[key] for key, value in cut(c).items()) / total

    plain = density - sum(value * sizes[key] for key, value in raised.items()) / total
    if abs(mean(plain) - density) < 1e-12:
        return cut(plain)
    low, high = -1.0 - max(raised.values()), 1.0
    for _ in range(100):  # mean is continuous and never falls as c grows
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < density else (low, middle)
    return cut(high)


def _erdos(shape: Sequence[int]) -> float:
    product = 1
    for extent in shape:
        product *= extent
    return sum(shape) / max(1, product)


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


def _fill(
    layers: Sequence[LayerInfo],
    density: float,
    fixed: dict[str, float],
    raw: Callable[[LayerInfo], float],
) -> dict[str, float]:
    """Densities eps * raw for the free layers; one that would exceed 1 becomes dense, again."""
    budget = density * sum(layer.size for layer in layers)
    fixed = dict(fixed)
    while True:
        free = [layer for layer in layers if layer.name not in fixed and layer.size]
        left = budget - sum(fixed.get(layer.name, 0.0) * layer.size for layer in layers)
        divisor = sum(raw(layer) * layer.size for layer in free)
        if not free:
            break
        if left <= 0:
            raise UsageError(
                f"density {density:g} is too low: layers that must stay dense use up the budget"
            )
        eps = left / divisor
        over = [layer for layer in free if eps * raw(layer) > 1.0]
        if not over:
            fixed.update({layer.name: eps * raw(layer) for layer in free})
            break
        worst = max(raw(layer) for layer in over)
        fixed.update({layer.name: 1.0 for layer in over if raw(layer) == worst})
    return {layer.name: fixed.get(layer.name, 1.0) for layer in layers}
