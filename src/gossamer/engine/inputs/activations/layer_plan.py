"""What calibration found of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.core.activations import InputState
from gossamer.core.budget import Fraction, Threshold


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What one layer of an `ActivationPlan` keeps.

    Attributes
    ----------
    name : str
        Of the layer, dotted.
    shape : tuple of int
        (out, in) of its weight.
    density : float
        The fraction of its weights that a token is meant to read.
    budget : Threshold or Fraction
        Which inputs are kept, by their scores.
    state : InputState
        What scores are made of.
    rotation : Tensor, optional
        V (in, in) where the method turns the inputs; one tensor for layers that share them.
    zeros : float, optional
        The fraction of inputs that were exactly zero in calibration.
    group : int
        The same number for layers that are called with the same tensor.
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
