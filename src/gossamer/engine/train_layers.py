"""The layers that a sparse training run holds, seen as matrices, and their first gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.matrix import is_transposed
from gossamer.models.layers import prunable_layers


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """One weight in the run; layers that share it are known by the first one's name."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    block: int | None

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (out, in), laid out as `core.matrix.as_matrix`."""
        tensor = tensor.detach()
        if tensor.dim() == 1:
            return tensor.unsqueeze(1)
        if tensor.dim() == 4:
            return tensor.permute(0, 2, 3, 1).reshape(tensor.shape[0], -1)
        return tensor.t() if is_transposed(self.module) else tensor

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.weight.dim() == 1:
            return matrix.squeeze(1)
        if self.weight.dim() == 4:
            out, channels, height, width = self.weight.shape
            return matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2)
        return matrix.t() if is_transposed(self.module) else matrix


def trained_layers(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    include: Sequence[str],
    exclude: Sequence[str],
    scales: bool = False,
) -> list[TrainedLayer]:
    """The trainable prunable layers, or with `scales` the batch norms, one per distinct weight.

    Raises UsageError when the optimizer holds parameters that the model lacks or lacks one that
    would be masked, and when every layer is frozen.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    foreign = held - {id(p) for p in model.parameters()}
    if foreign:
        raise UsageError(
            f"the optimizer holds {len(foreign)} parameters that are not the model's; construct it "
            "from model.parameters() after the model is in its final form"
        )
    if scales and include:
        raise UsageError("a method that acts on batch norms takes all of them; narrow by exclude=")
    layers = norm_layers(model, exclude) if scales else unfrozen_layers(model, include, exclude)
    for layer in layers:
        if not isinstance(layer.weight, nn.Parameter) or id(layer.weight) not in held:
            raise UsageError(
                f"{layer.name}: its weight is not in the optimizer; freeze or exclude it"
            )
    return layers


def unfrozen_layers(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[TrainedLayer]:
    """The trainable prunable layers, one per distinct weight; UsageError when all are frozen."""
    layers: dict[int, TrainedLayer] = {}
    for name, (module, block) in prunable_layers(model, include, exclude, tied=True).items():
        weight = module.weight
        if weight.requires_grad and id(weight) not in layers:
            layers[id(weight)] = TrainedLayer(name, module, cast(nn.Parameter, weight), block)
    if not layers:
        raise UsageError("every layer that could be masked is frozen")
    return list(layers.values())


def norm_layers(model: nn.Module, exclude: Sequence[str]) -> list[TrainedLayer]:
    """The batch norms with a trainable scale, less those that `exclude` names."""
    layers = [
        TrainedLayer(name, module, module.weight, None)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.affine
        and module.weight.requires_grad
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not layers:
        raise UsageError(f"{type(model).__name__} has no batch norm with a trainable scale")
    return layers


def start_gradients(
    model: nn.Module,
    layers: Sequence[TrainedLayer],
    loss: Callable[[], Tensor] | None,
    method: str,
) -> dict[str, Tensor]:
    """The gradient of one loss by layer; buffers, gradients and random state stay as they were.

    Raises UsageError without a loss or under no_grad, NonFiniteError for a NaN loss.
    """
    if loss is None:
        raise UsageError(f"{method} looks at gradients before training: pass loss=, a function "
                         "that returns the loss of one batch")  # fmt: skip
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            value = loss()
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise UsageError(f"{method}: the loss has no gradient; was it computed in no_grad?")
        found = torch.autograd.grad(value, [x.weight for x in layers], allow_unused=True)
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
    gradients = {}
    for layer, gradient in zip(layers, found, strict=True):
        if gradient is None:
            raise UsageError(f"{layer.name}: the loss does not depend on it; exclude it")
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(
                f"{layer.name}: the loss of the first batch has no finite gradient"
            )
        gradients[layer.name] = layer.matrix(gradient).clone()
    return gradients
