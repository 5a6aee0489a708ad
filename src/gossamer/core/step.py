"""What a topology method sees of one step of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo


@dataclass(frozen=True)
class Step:
    """One step of a sparse training run, as plain data.

    Parameters
    ----------
    number : int
        Optimizer steps taken, from 1; 0 before the first.
    total : int
        How many there will be.
    rates : mapping of str to float
        The learning rate of each layer's weight in the last step.
    layers : sequence of LayerInfo
        The layers in training, with their weights as matrices (out, in) and their state.
    masks : mapping of str to Tensor
        The present support, bool (out, in); empty before the first.
    generator : torch.Generator
        On the CPU; the same on all ranks.
    gradients : callable
        Gives the whole gradients (out, in) by layer, kept weights or not. Before the first step
        these are of the loss that was passed. Later they are those of this step, for methods whose
        card needs `gradients`. Raises UsageError where there are none.
    """

    number: int
    total: int
    rates: Mapping[str, float]
    layers: Sequence[LayerInfo]
    masks: Mapping[str, Tensor]
    generator: torch.Generator
    gradients: Callable[[], Mapping[str, Tensor]]

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, from 0 to 1."""
        return self.number / self.total
