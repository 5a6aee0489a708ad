"""What a topology method sees of one step of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.errors import UsageError


class StartLoss(Protocol):
    """The loss before training as a function of the weights, to be differentiated."""

    def __call__(self, weights: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        """The loss that was passed, with these weights (out, in) in the layers' places.

        A scalar with its graph, which second derivatives pass too. The outputs of the model are
        divided by `temperature` first. The model stays as it is.
        """
        ...


class StartOutputs(Protocol):
    """The model before training as a function of the weights, to be differentiated."""

    def __call__(self, weights: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
        """The outputs for one input of ones, in evaluation mode, with these weights (out, in).

        `change` gives what stands in the place of every other parameter and buffer of real
        numbers. The ones are of the weights' dtype, and of the shape of what the loss is computed
        from. The model stays as it is.
        """
        ...


def _over(*_: Any, **__: Any) -> NoReturn:
    raise UsageError("the loss is there before the first step alone; look at it in `start`")


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
    loss, outputs : callable
        The loss that was passed and the outputs of the model, as functions of the layers' weights:
        see `StartLoss` and `StartOutputs`. Both raise UsageError after the start, and where no loss
        was passed.
    """

    number: int
    total: int
    rates: Mapping[str, float]
    layers: Sequence[LayerInfo]
    masks: Mapping[str, Tensor]
    generator: torch.Generator
    gradients: Callable[[], Mapping[str, Tensor]]
    loss: StartLoss = _over
    outputs: StartOutputs = _over

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, from 0 to 1."""
        return self.number / self.total
