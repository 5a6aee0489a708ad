"""Cutting channels out of layers, and folding what they carry into the biases of their readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.engine.hooks import evaluating, observe_inputs
from gossamer.engine.prune.channels import ChannelSet


@dataclass(frozen=True, eq=False)
class Cut:
    """What is to go from one set: `gone` bool (width,), on the CPU."""

    channels: ChannelSet
    gone: Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """A reader's input by index, float64 on the CPU: its mean over the example, and whether it is
    the same at every position of every input tried."""

    mean: Tensor
    constant: Tensor


def dead(x: ChannelSet, model: nn.Module) -> Tensor:
    """Channels that no writer changes, bool (width,).

    A writer changes nothing where its weights are zero, or where all that it gives passes a norm
    with scale zero or a depthwise layer with weights zero.
    """
    modules = dict(model.named_modules())
    known: dict[str, Tensor] = {}
    everything = torch.ones(x.coupled.width, dtype=torch.bool)

    def arrives(name: str) -> Tensor:
        """Channels of the layer's output that arrive anywhere."""
        if name not in known:
            known[name] = everything  # should the graph have a cycle
            known[name] = ~everything
            for taker in x.after.get(name, (None,)):
                known[name] = known[name] | (
                    everything if taker is None else _lets(modules[taker]) & arrives(taker)
                )
        return known[name]

    alive = ~everything
    for name in x.coupled.layers:
        lets = _lets(modules[name])
        # A layer that writes other channels too belongs to no set that can be cut.
        alive = alive | ((lets & arrives(name)) if len(lets) == len(alive) else everything)
    return ~alive


def reader_inputs(
    model: nn.Module, sets: Sequence[ChannelSet], inputs: Sequence[Tensor]
) -> dict[str, Inputs]:
    """What every reader of the sets is given, in eval mode; the first input is the example."""
    modules = dict(model.named_modules())
    readers = {name: modules[name] for x in sets for name in x.inputs}
    lowest: dict[str, Tensor] = {}
    highest: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor) -> None:
        axis = -3 if isinstance(readers[name], nn.Conv2d) else -1
        flat = x.detach().movedim(axis, 0).flatten(1).cpu().double()
        low, high = flat.amin(1), flat.amax(1)
        means.setdefault(name, flat.mean(1))
        lowest[name] = torch.minimum(lowest.get(name, low), low)
        highest[name] = torch.maximum(highest.get(name, high), high)

    with observe_inputs(readers, watch), evaluating(model):
        for x in inputs:
            model(x.clone())
    precision = 64 * torch.finfo(_dtype(model)).eps
    return {
        name: Inputs(
            mean, highest[name] - lowest[name] <= precision * highest[name].abs().clamp_min(1)
        )
        for name, mean in means.items()
    }


def inexact(x: ChannelSet, model: nn.Module, given: Mapping[str, Inputs]) -> Tensor:
    """Channels whose part in some reader no bias can replace, bool (width,): they vary, or they
    are a constant other than zero that the reader pads with zeros."""
    modules = dict(model.named_modules())
    found = torch.zeros(x.coupled.width, dtype=torch.bool)
    for name, (index, channel) in x.inputs.items():
        seen = given[name]
        bad = ~seen.constant
        if _pads_zeros(modules[name]):
            bad = bad | (seen.mean.abs() > torch.finfo(torch.float64).eps)
        found[channel[bad[index]]] = True
    return found


@torch.no_grad()
def silence(model: nn.Module, cuts: Sequence[Cut], given: Mapping[str, Inputs] | None) -> None:
    """Let the readers ignore what is to go, in place; with `given` its mean goes to their bias."""
    modules = dict(model.named_modules())
    for name, gone in _read(cuts, modules).items():
        module = modules[name]
        assert isinstance(module, nn.Linear | nn.Conv2d)
        if given is not None:
            _fold(module, gone, given[name].mean)
        module.weight[:, gone.to(module.weight.device)] = 0


@torch.no_grad()
def cut(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Cut the channels out of everything that holds them, in place."""
    modules = dict(model.named_modules())
    read = _read(cuts, modules)
    for x in cuts:
        for name in x.channels.members:
            _cut_outputs(modules[name], ~x.gone)
    for name, gone in read.items():
        _cut_inputs(modules[name], ~gone)


def _lets(module: nn.Module) -> Tensor:
    """Output channels with any weight that is not zero."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.detach().reshape(len(weight), -1) != 0).any(1).cpu()


def _read(cuts: Sequence[Cut], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """By reader the inputs that go."""
    found: dict[str, Tensor] = {}
    for x in cuts:
        for name, (index, channel) in x.channels.inputs.items():
            width = modules[name].weight.shape[1]  # type: ignore[index]
            gone = found.setdefault(name, torch.zeros(int(width), dtype=torch.bool))
            gone[index[x.gone[channel]]] = True
    return found


def _fold(module: nn.Linear | nn.Conv2d, gone: Tensor, mean: Tensor) -> None:
    """Put what the inputs that go contribute on average into the bias."""
    weight = module.weight.cpu().double()
    weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    shift = weight[:, gone] @ mean[gone]
    if not bool(shift.any()):
        return
    if module.bias is None:
        zeros = torch.zeros_like(module.weight.flatten(1)[:, 0])
        module.bias = nn.Parameter(zeros, module.weight.requires_grad)
    module.bias.add_(shift.to(module.bias))


def _pads_zeros(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and max(module.kernel_size) > 1
    return any(module.padding)


def _cut_outputs(module: nn.Module, keep: Tensor) -> None:
    """Leave only these output channels."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(module, name, None)
        # PReLU may have one slope for all.
        if isinstance(value, Tensor) and len(value) == len(keep):
            rows = value[keep.to(value.device)]
            kept = nn.Parameter(rows, value.requires_grad) if name in module._parameters else rows
            setattr(module, name, kept)
    width = int(keep.sum())
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            module.groups = module.in_channels = width
        module.out_channels = width
    elif isinstance(module, nn.Linear):
        module.out_features = width
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    else:
        module.num_features = width  # type: ignore[assignment]


def _cut_inputs(module: nn.Module, keep: Tensor) -> None:
    """Leave only these inputs."""
    assert isinstance(module, nn.Linear | nn.Conv2d)
    weight = module.weight
    module.weight = nn.Parameter(weight[:, keep.to(weight.device)], weight.requires_grad)
    if isinstance(module, nn.Conv2d):
        module.in_channels = int(keep.sum())
    else:
        module.in_features = int(keep.sum())


def _dtype(model: nn.Module) -> torch.dtype:
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return kinds[0] if kinds else torch.get_default_dtype()
