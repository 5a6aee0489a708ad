"""DeepZero: train by values of the loss alone, on a random part of the weights at a time.

Moves one weight after the other by a little, and takes what the loss does as its gradient. Only a
random tenth of the weights is asked about, which changes during training. All weights stay.

**Paper.** DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training, 2023.
https://arxiv.org/abs/2310.02025

**Claim.** ResNet-20 trained on CIFAR-10 without backpropagation reaches the best accuracy among
methods that use values of the loss alone. Coordinate-wise estimates are better than random
directions for as many forward passes.

**Defaults.** Coordinate-wise, a step of 0.005, a tenth of the weights, a new choice after
each tenth of the run, which is five of fifty epochs.

**Notes.** The trained model is dense: what is sparse is the gradient. Matrices and kernels are
masked; biases and the scales of norms are estimated in full, as released. The shares of layers come
from an allocation, `ERK()` by default. The paper takes them from GraSP without gradients, which is
not built here. Activations are not kept for reuse, and queries are not split over processes.

Random directions are standard normal over all that is asked about, and the mean over directions is
an unbiased estimate for small steps. The release draws a direction of length 1 for each tensor,
scales the estimate by the step once more, and adds one direction upon the other. Weights are put
back bit for bit here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.core.allocation import ERK, LayerInfo
from gossamer.core.card import Card
from gossamer.core.density import check_density
from gossamer.core.errors import UsageError
from gossamer.methods.weights.topology import (
    ShapeAllocation,
    check_fraction,
    check_whole,
    layer_counts,
    random_masks,
)


@dataclass(frozen=True)
class DeepZero:
    """Finite differences of the loss, for a random part of the weights.

    A step asks for the loss once for every weight in question, or once for each random direction,
    and once more.

    Parameters
    ----------
    active : float
        The fraction of the weights that is asked about at a time, in (0, 1].
    mu : float
        How far a weight is moved.
    estimator : {"coordinate", "random"}
        One weight after the other, or random directions.
    directions : int
        How many random directions a step takes.
    period : float
        The fraction of the run for which a choice of weights holds.
    allocation : Allocation
        How the fraction becomes one per layer. `ERK()` by default.

    References
    ----------
    DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training (2023).
    """

    active: float = 0.1
    mu: float = 5e-3
    estimator: Literal["coordinate", "random"] = "coordinate"
    directions: int = 10
    period: float = 0.1
    allocation: ShapeAllocation = field(default_factory=ERK)

    card: ClassVar[Card] = Card(
        name="deepzero",
        topic="weights",
        role="gradient_source",
        needs=(),
        patterns=("unstructured",),
        year=2023,
        link="https://arxiv.org/abs/2310.02025",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_density(self.active)
        check_fraction(self.period, "DeepZero: period")
        check_whole(self.directions, "DeepZero: directions")
        if not 0 < self.mu < torch.inf:
            raise UsageError(f"DeepZero: mu is a step above 0, not {self.mu!r}")
        if self.estimator not in ("coordinate", "random"):
            raise UsageError(f"DeepZero: estimator is coordinate or random, not {self.estimator!r}")

    def due(self, number: int, total: int) -> bool:
        """After each `period` of the run."""
        return number % max(1, round(self.period * total)) == 0

    def coordinates(
        self, parameters: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random weights of matrices and kernels with the allocation's exact counts; all others."""
        chosen = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
        layers = [
            LayerInfo(name, tuple(p.shape), None, p.detach().flatten(1))
            for name, p in parameters.items()
            if p.dim() > 1
        ]
        if layers:
            counts = layer_counts(layers, self.allocation, self.active)
            for name, mask in random_masks(layers, counts, generator).items():
                chosen[name] = mask.reshape(parameters[name].shape)
        return chosen

    def queries(self, coordinates: Mapping[str, Tensor]) -> int:
        """One for the loss as it is, and one for each weight or direction."""
        if self.estimator == "random":
            return 1 + self.directions
        return 1 + sum(int(mask.sum()) for mask in coordinates.values())

    def estimate(
        self,
        loss: Callable[[], float],
        parameters: Mapping[str, Tensor],
        coordinates: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Finite differences at the coordinates, zero elsewhere. Parameters end as they were."""
        if self.estimator == "random":
            return self._along_directions(loss, parameters, coordinates, generator)
        base = loss()
        found = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            for place in coordinates[name].nonzero().tolist():
                at = tuple(place)
                value = parameter[at].clone()
                parameter[at] = value + self.mu
                found[name][at] = (loss() - base) / self.mu
                parameter[at] = value
        return found

    def _along_directions(
        self,
        loss: Callable[[], float],
        parameters: Mapping[str, Tensor],
        coordinates: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The mean over random directions of the loss's slope along each, times the direction."""
        base = loss()
        found = {name: torch.zeros_like(p) for name, p in parameters.items()}
        before = {name: p.clone() for name, p in parameters.items()}
        for _ in range(self.directions):
            directions = {
                name: torch.randn(p.shape, generator=generator).to(p) * coordinates[name]
                for name, p in parameters.items()
            }
            for name, parameter in parameters.items():
                parameter.copy_(before[name] + self.mu * directions[name])
            slope = (loss() - base) / self.mu
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
                found[name] += slope / self.directions * directions[name]
        return found
