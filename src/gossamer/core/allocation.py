"""Allocations: how one density over the model becomes one density per layer.

Every allocation meets the budget: sum of density_l * size_l equals density * sum of size_l.
Those that rank the weights of all layers together are in `ops.allocation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.density import check_density
from gossamer.core.errors import UsageError


@dataclass(frozen=True, eq=False)
class LayerInfo:
    """A layer as allocations see it.

    shape: of the original weight (a convolution's is 4-d). weight: (out, in). block: index of the
    transformer block. norm: (in,) 2-norms of the dense model's calibration inputs, or None. angle:
    how far the dense block turns its hidden state, as a fraction of a half turn, or None. state: the tensors that a training method keeps for the layer, by names of its own.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None
    weight: Tensor
    norm: Tensor | None = None
    angle: float | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.weight.numel()


@dataclass(frozen=True)
class Uniform:
    """The same density everywhere."""

    needs: ClassVar[tuple[str, ...]] = ()

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
    needs: ClassVar[tuple[str, ...]] = ()

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

    needs: ClassVar[tuple[str, ...]] = ()

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

    needs: ClassVar[tuple[str, ...]] = ()

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
    needs: ClassVar[tuple[str, ...]] = ()

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
    needs: ClassVar[tuple[str, ...]] = ("norm",)

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


@dataclass(frozen=True)
class BlockInfluence:
    """Densities that follow how far each block turns the hidden state: the coarse half of CFSP.

    A block's importance is the mean angle between the hidden states of a token before and after it.
    Its density is that of the budget times the sigmoid of its importance above the mean, over the
    mean of all sigmoids. Where a density would exceed 1, all are drawn towards the mean until the
    largest is 1. Layers outside blocks have the density of the budget.

    The release sums angles over 128 windows of 2048 tokens and divides by 10000. Here the mean angle
    is scaled as if so many tokens had been seen, whatever the data. The mean is weighted by size,
    so that unequal blocks meet the budget exactly. The release draws densities further in, by 1.05.
    The paper cuts neurons by it; as an allocation it serves every method here.

    Parameters
    ----------
    sharpness : float
        How strongly densities follow importance.

    References
    ----------
    CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation
    Information (2024).
    """

    sharpness: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("angle",)

    def __post_init__(self) -> None:
        if not self.sharpness >= 0:
            raise UsageError("BlockInfluence needs a sharpness of at least 0")

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]:
        """Density by layer name; raises UsageError for a model without blocks."""
        density = check_density(density)
        angles = {x.block: x.angle for x in layers if x.block is not None}
        if not angles:
            raise UsageError("BlockInfluence needs a model with blocks; choose another allocation")
        for block, angle in angles.items():
            if angle is None:
                raise UsageError(f"block {block}: BlockInfluence needs the angle that it turns")
        known = {block: angle for block, angle in angles.items() if angle is not None}
        mean = sum(known.values()) / len(known)
        scale = self.sharpness * 128 * 2048 / 1e4
        raw = {block: _sigmoid(scale * (angle - mean)) for block, angle in known.items()}
        inside = [x for x in layers if x.block is not None]
        total = sum(x.size for x in inside)
        level = sum(raw[x.block] * x.size for x in inside if x.block is not None) / total
        largest = max(raw.values()) / level
        drawn = 1.0 if largest * density <= 1 else (1 / density - 1) / (largest - 1)
        shares = {block: 1 + drawn * (value / level - 1) for block, value in raw.items()}
        found = {x.name: density * (1.0 if x.block is None else shares[x.block]) for x in layers}
        for layer in layers:
            if layer.size and round(found[layer.name] * layer.size) == 0:
                raise UsageError(f"{layer.name}: would lose every weight; lower the sharpness")
        return {name: min(1.0, value) for name, value in found.items()}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


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
