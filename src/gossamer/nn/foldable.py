"""The layers that stand in for an ordinary one, and can become it again."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class Foldable(nn.Module, ABC):
    """A cheaper layer with the inputs and outputs of a Linear."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @abstractmethod
    def fold(self) -> nn.Linear:
        """A new Linear with the same outputs; this layer stays as it is."""

    def extra_repr(self) -> str:
        """Inputs, outputs and bias, as a Linear shows them."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def linear_of(layer: Foldable, weight: nn.Parameter) -> nn.Linear:
    """A Linear with this weight (out, in) and a copy of the layer's bias."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = weight
    if layer.bias is not None:
        bias = layer.bias.detach().clone()
        linear.bias = nn.Parameter(bias, layer.bias.requires_grad)
    return linear.train(layer.training)
