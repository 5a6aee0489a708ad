"""What calibration found of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.core.activations import InputState
from gossamer.core.budget import Fraction, Threshold


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer: its (out, in) shape, the fraction of weights that a token reads, which inputs.

    zeros: the fraction of inputs that were exactly zero in calibration; None without data. group:
    the same number for layers that are called with the same tensor.
    rotation: V (in, in) where the method turns the layer's inputs; shared by those that share them.
    """

    name: str
    shape: tuple[int, int]
    density: float
    budget: Threshold | Fraction
    state: InputState
    rotation: Tensor | None = None
    zeros: float | None = None
    group: int = 0


def turned(weight: Tensor, rotation: Tensor | None) -> Tensor:
    """W V, computed in float32 and rounded to the weight's dtype."""
    if rotation is None:
        return weight
    return (weight.float() @ rotation.float()).to(weight.dtype)
