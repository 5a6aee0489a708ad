"""What a small problem offers to whoever trains on it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Problem(Protocol):
    """Data, models that fit it, a loss for each step, and a quality.

    The batch of a step depends on the seed and the step alone, so a run continues where it stopped
    without the state of a data loader. better: `higher` or `lower`, of the quality.
    """

    name: str
    metric: str
    better: str

    def build(self, seed: int) -> nn.Module:
        """An untrained model with weights from the seed."""
        ...

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """The loss on the batch of this step."""
        ...

    def quality(self, model: nn.Module) -> float:
        """How good the model is on held-out data; its mode is restored."""
        ...
