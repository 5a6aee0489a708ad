"""What a small problem offers to whoever trains on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Problem(Protocol):
    """Data, models that fit it, a loss for each step, and a quality.

    The batch of a step depends on the seed and the step alone, so a run continues where it stopped
    without the state of a data loader.
    """

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str:
        """What the quality is called."""
        ...

    @property
    def better(self) -> str:
        """`higher` or `lower`, of the quality."""
        ...

    @property
    def optimizer(self) -> str:
        """What suits its models: `sgd` or `adamw`."""
        ...

    def build(self, seed: int) -> nn.Module:
        """A model to train; random weights come from the seed."""
        ...

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """The loss on the batch of this step, from 0."""
        ...

    def quality(self, model: nn.Module) -> float:
        """How good the model is on held-out data; its mode is restored."""
        ...

    def inputs(self) -> Sequence[Tensor] | None:
        """Batches on which batch norms take new statistics; None for models without any."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What a loss depends on besides model, step and seed: a hash of the data, a batch size."""
        ...
