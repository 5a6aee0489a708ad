"""The layers that a sparse training run holds, seen as matrices, and their first gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.matrix import is_transposed, own_forward, why_not_plain
from gossamer.core.support import zero_outside
from gossamer.engine.train.distributed import Ranks, is_sharded, local, local_part, whole
from gossamer.engine.train.optimizers import held_by
from gossamer.models.layers import EXPECTED, adapter_prefixes, default_reasons, prunable_layers
from gossamer.models.weights import find_weights

_CHANCE = 0.01
"""So many zeros a dense weight may have, of padding entries or by rounding."""


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """One weight in the run; layers that share it are known by the first one's name."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    block: int | None

    @property
    def matrix_shape(self) -> torch.Size:
        """The shape of `matrix`."""
        shape = self.weight.shape
        if len(shape) in (1, 4):
            return torch.Size((shape[0], shape.numel() // max(1, shape[0])))
        return torch.Size(shape[::-1]) if is_transposed(self.module) else shape

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (out, in), laid out as `core.matrix.as_matrix`.

        Whole: where ranks hold parts of it, it is gathered, so all of them must call.
        """
        tensor = whole(tensor)
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

    @torch.no_grad()
    def write(self, target: Tensor, matrix: Tensor) -> None:
        """Copy a matrix into a tensor of the weight's shape, each rank its own part."""
        local(target).copy_(local_part(self.tensor(matrix), target))

    @torch.no_grad()
    def clear(self, target: Tensor, mask: Tensor) -> None:
        """Zero a tensor of the weight's shape outside a mask (out, in), each rank its own part."""
        zero_outside(local(target), local_part(self.tensor(mask), target))


def trained_layers(
    model: nn.Module,
    include: Sequence[str],
    exclude: Sequence[str],
    scales: bool = False,
) -> list[TrainedLayer]:
    """The trainable prunable layers, or with `scales` the batch norms, one per distinct weight.

    Raises UsageError when every layer is frozen.
    """
    if scales and include:
        raise UsageError("a method that acts on batch norms takes all of them; narrow by exclude=")
    return norm_layers(model, exclude) if scales else unfrozen_layers(model, include, exclude)


def check_held(
    model: nn.Module, optimizer: torch.optim.Optimizer, layers: Sequence[TrainedLayer]
) -> None:
    """Raise UsageError when the optimizer holds parameters that the model lacks, or lacks one that
    would be masked."""
    held = held_by(optimizer)
    foreign = held - {id(p) for p in model.parameters()}
    if foreign:
        raise UsageError(
            f"the optimizer holds {len(foreign)} parameters that are not the model's; construct it "
            "from model.parameters() after the model is in its final form, without master copies "
            "and not of an average of it"
        )
    for layer in layers:
        if id(layer.weight) not in held:
            raise UsageError(
                f"{layer.name}: its weight is not in the optimizer; freeze or exclude it"
            )


def check_kept(
    model: nn.Module, layers: Sequence[TrainedLayer], exclude: Sequence[str], method: str
) -> None:
    """Raise UsageError for trainable weights with zeros that no mask of the run would hold.

    For Keep, which promises to hold the zeros that are there. Weights that `exclude` names, and
    those without or with nothing but zeros, are no matter.
    """
    if method != "keep":
        return
    held = {id(x.weight) for x in layers}
    adapters = adapter_prefixes(model)
    for name, weight in find_weights(model).items():
        parameter = weight.module._parameters.get(weight.parameter)
        named = any(fnmatchcase(name, pattern) for pattern in exclude)
        if parameter is None or not parameter.requires_grad or id(parameter) in held or named:
            continue
        zeros = float((local(weight.tensor) == 0).float().mean())
        if _CHANCE < zeros < 1 and not (adapters and name.startswith(adapters)):
            remedy = "name it in include=" if weight.plain else "freeze it (requires_grad_(False))"
            raise UsageError(
                f"{name}: {zeros:.0%} of its weights are zero, and this run would not hold them; "
                f"{remedy}"
            )


def chosen_layers(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[TrainedLayer]:
    """The prunable layers, frozen or not, one per distinct weight.

    A layer with a forward of its own is among them only if it is named, for zeros in its stored
    weight may be none in what it computes.

    Raises UsageError for a weight that is recomputed at every forward.
    """
    layers: dict[int, TrainedLayer] = {}
    for name, (module, block) in prunable_layers(model, include, exclude, tied=True).items():
        weight = own_parameter(name, module)
        named = any(fnmatchcase(name, pattern) for pattern in include)
        if id(weight) not in layers and (named or own_forward(module) is None):
            layers[id(weight)] = TrainedLayer(name, module, weight, block)
    return list(layers.values())


def frozen_layers(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], scales: bool = False
) -> list[TrainedLayer]:
    """The prunable layers that a run leaves alone because they are frozen."""
    layers = [] if scales else chosen_layers(model, include, exclude)
    return [x for x in layers if not x.weight.requires_grad]


def unfrozen_layers(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[TrainedLayer]:
    """The trainable prunable layers, one per distinct weight; UsageError when all are frozen."""
    layers = [x for x in chosen_layers(model, include, exclude) if x.weight.requires_grad]
    if not layers:
        hint = (
            "; adapters stay dense, and sparse_lora of gossamer.integrations.peft holds the zeros"
        )
        raise UsageError(
            "every layer that could be masked is frozen" + hint * bool(adapter_prefixes(model))
        )
    return layers


def left_dense(
    model: nn.Module, layers: Sequence[TrainedLayer], exclude: Sequence[str]
) -> dict[str, str]:
    """Why prunable weights are in no layer of the run, by name."""
    masked, expected = {id(x.weight) for x in layers}, default_reasons(model)
    found = {}
    for name, weight in find_weights(model).items():
        parameter = weight.module._parameters.get(weight.parameter)
        if parameter is None or id(parameter) in masked:
            continue
        reason = expected.get(name) or own_forward(weight.module) or _UNMASKED
        if not parameter.requires_grad:
            reason = _FROZEN
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            reason = EXPECTED["exclude"]
        found[name] = reason
    return found


def warn_dense(left: Mapping[str, str]) -> None:
    """Log the weights that train dense for a reason that nobody asked for."""
    odd = [name for name, reason in left.items() if reason not in (*EXPECTED.values(), _FROZEN)]
    if odd:
        verb = f"and {len(odd) - 1} more train" if len(odd) > 1 else "trains"
        text = "%s %s dense: %s; the run's left_out names all"
        logging.getLogger("gossamer").warning(text, odd[0], verb, left[odd[0]])


_FROZEN = "it is frozen"
_UNMASKED = "training masks Linear, Conv1D and ungrouped Conv2d layers alone"


def own_parameter(name: str, module: nn.Module) -> nn.Parameter:
    """The weight of a layer. Raises UsageError, with the remedy, where it is recomputed at every
    forward: what is written to it would be lost at the next."""
    if "weight" not in module._parameters:
        raise UsageError(f"{name}: {why_not_plain(module)}; or exclude it")
    return cast(nn.Parameter, module.weight)


def norm_layers(model: nn.Module, exclude: Sequence[str]) -> list[TrainedLayer]:
    """The batch norms with a trainable scale, less those that `exclude` names."""
    layers = [
        TrainedLayer(name, module, own_parameter(name, module), None)
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
    ranks: Ranks,
) -> dict[str, Tensor]:
    """The gradient of one loss by layer, averaged over ranks; buffers, gradients and random state
    stay as they were.

    Raises UsageError without a loss or under no_grad, NonFiniteError for a NaN loss.
    """
    if loss is None:
        raise UsageError(f"{method} looks at gradients before training: pass loss=, a function "
                         "that returns the loss of one batch")  # fmt: skip
    gradients: dict[str, Tensor] = {}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            value = loss()
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise UsageError(f"{method}: the loss has no gradient; was it computed in no_grad?")
        found = _gradients(model, value, [x.weight for x in layers])
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
    for layer, gradient in zip(layers, found, strict=True):
        if ranks.any(gradient is None):
            raise UsageError(f"{layer.name}: the loss does not depend on it; exclude it")
        assert gradient is not None
        gradients[layer.name] = layer.matrix(gradient).clone()
        if not is_sharded(gradient):
            ranks.average([gradients[layer.name]])
        if not bool(torch.isfinite(gradients[layer.name]).all()):
            raise NonFiniteError(
                f"{layer.name}: the loss of the first batch has no finite gradient"
            )
    return gradients


def whole_gradients(layers: Sequence[TrainedLayer], method: str, ranks: Ranks) -> dict[str, Tensor]:
    """The gradients of all weights by layer, the same on all ranks.

    Those of DDP are averaged already, but not where a step was taken under no_sync.
    """
    missing = [x.name for x in layers if x.weight.grad is None]
    if ranks.any(bool(missing)):
        raise UsageError(
            f"{missing[0] if missing else 'on another rank a layer'}: has no gradient, and "
            f"{method} grows weights by it in this step; call backward() on a loss that was not "
            "computed under no_grad"
        )
    found = {}
    for layer in layers:
        gradient = layer.weight.grad
        assert gradient is not None
        found[layer.name] = layer.matrix(gradient).clone()
        if not is_sharded(gradient):
            ranks.average([found[layer.name]])
    return found


def start_newcomers(
    layers: Sequence[TrainedLayer],
    passed: Sequence[Mapping[str, Tensor]],
    draw: Callable[[int], Tensor],
) -> None:
    """Set the weights that an update brought in to `draw(their count)`, layer by layer.

    passed: the masks before it and all that it passed through.
    """
    for layer in layers:
        masks = [x[layer.name] for x in passed]
        new = masks[-1] & ~torch.stack(masks).all(0)
        weight = layer.matrix(layer.weight).clone()
        weight[new] = draw(int(new.sum())).to(weight)
        layer.write(layer.weight, weight)


def _gradients(
    model: nn.Module, loss: Tensor, weights: Sequence[nn.Parameter]
) -> Sequence[Tensor | None]:
    """The gradients of a loss; those that the model held stay as they were."""
    if not any(is_sharded(weight) for weight in weights):
        return torch.autograd.grad(loss, weights, allow_unused=True)
    # FSDP2 computes with gathered copies, whose gradients reach the shards in backward() only.
    before = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.grad = None
        loss.backward()
        return [weight.grad for weight in weights]
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient
