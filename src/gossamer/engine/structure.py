"""Structured zeros into smaller dense networks: which channels hang together, and cutting them out.

The dependencies come from torch-pruning, which traces the model's autograd graph (DepGraph: Towards
Any Structural Pruning, 2023); the cutting is done here, so that only layers whose function is known
are cut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from gossamer.core.coupling import Coupled
from gossamer.core.errors import MissingExtra, UsageError
from gossamer.engine.hooks import evaluating, observe_inputs


@dataclass(frozen=True, eq=False)
class ShrinkResult:
    """The smaller network, and what became of it.

    removed: channels cut out, by the name of the first layer that wrote them. parameters, flops:
    before and after, flops of one forward pass on the example. deviation: the largest difference
    between the outputs of the given and of the smaller network on the example, in eval mode.
    """

    model: nn.Module
    removed: dict[str, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    deviation: float


@dataclass(frozen=True, eq=False)
class _Set:
    """A coupled set, and by reader: its input index and the channel it carries, as two tensors."""

    coupled: Coupled
    inputs: Mapping[str, tuple[Tensor, Tensor]]


def coupled_channels(
    model: nn.Module, example: Tensor, exclude: Sequence[str] = ()
) -> tuple[Coupled, ...]:
    """The sets of output channels that can be removed, each with all that must follow.

    example: one batch of inputs. exclude: names of layers whose channels stay. For convolutional
    networks and perceptrons. Left out are sets that nothing reads (the model's output) and sets
    with a member that cannot be cut without changing the function: layer and group norms, grouped
    convolutions, norms over concatenations, bare parameters.

    Raises MissingExtra without torch-pruning, UsageError for a name that is none.
    """
    unknown = sorted(set(exclude) - {name for name, _ in model.named_modules()})
    if unknown:
        raise UsageError(f"exclude {unknown[0]!r} names no layer of the model")
    found = [x.coupled for x in _sets(model, example)]
    return tuple(x for x in found if not set(x.layers) & set(exclude))


def shrink(
    model: nn.Module, example: Tensor, coupled: Sequence[Coupled] | None = None
) -> ShrinkResult:
    """A smaller copy of the model, without the channels that carry nothing; the model stays.

    A channel goes when every layer that writes it has only zeros for it, or every batch norm over
    it has scale zero. What such a channel still carries (a bias, the shift of a norm) is folded
    into the biases of its readers, as its mean over the example in eval mode: exact where it is the
    same at every position, which zero padding on the way prevents unless it is zero. At least one
    channel of each set stays. coupled: the sets to look at, else all of them.

    Raises MissingExtra without torch-pruning, UsageError when a channel reaches the output.
    """
    sets = [x for x in _sets(model, example) if coupled is None or x.coupled in coupled]
    small = copy.deepcopy(model)
    modules = dict(small.named_modules())
    kept: dict[str, Tensor] = {}
    dropped: dict[str, Tensor] = {}
    removed = {}
    for x in sets:
        dead = _dead(x.coupled, modules)
        if not bool(dead.any()):
            continue
        removed[x.coupled.layers[0]] = int(dead.sum())
        for name in (*x.coupled.layers, *x.coupled.norms, *x.coupled.depthwise):
            kept[name] = ~dead
        for name, (index, channel) in x.inputs.items():
            gone = dropped.setdefault(name, torch.zeros(_inputs(modules[name]), dtype=torch.bool))
            gone[index[dead.cpu()[channel]]] = True
    before, size, flops = _measure(model, example)
    with torch.no_grad():
        for name, mean in _means(small, {n: modules[n] for n in dropped}, example).items():
            _fold(modules[name], dropped[name].to(mean.device), mean)
        for name, mask in kept.items():
            _cut_outputs(modules[name], mask)
        for name, gone in dropped.items():
            _cut_inputs(modules[name], ~gone)
    after, new_size, new_flops = _measure(small, example)
    if after.shape != before.shape:
        raise UsageError("a removed channel reaches the model's output; leave its set out")
    deviation = float((after - before).abs().max())
    return ShrinkResult(small, removed, (size, new_size), (flops, new_flops), deviation)


def _sets(model: nn.Module, example: Tensor) -> list[_Set]:
    """Every set that can be cut, traced on a copy so that the model stays untouched."""
    try:
        import torch_pruning
    except ImportError:
        raise MissingExtra("torch-pruning", "structured") from None
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(
            twin, example_inputs=example, verbose=False
        )
        groups = list(graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)))
    names = {id(module): name for name, module in twin.named_modules()}
    found = [_set(group, names, graph.is_out_channel_pruning_fn) for group in groups]
    return [x for x in found if x is not None]


def _set(group: Any, names: Mapping[int, str], is_output: Any) -> _Set | None:
    layers, norms, depthwise = [], [], []
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    width = len(group[0].idxs)
    for item in group:
        module, index, root = item.dep.target.module, list(item.idxs), list(item.root_idxs)
        name = names.get(id(module))
        if name is None:  # an operation without parameters, unless it is a bare parameter
            if isinstance(module, nn.Parameter):
                return None
            continue
        whole = is_output(item.dep.handler)
        if whole and (index != root or len(index) != width):
            return None
        if isinstance(module, _BatchNorm) and module.affine:
            norms.append(name)
        elif isinstance(module, nn.Conv2d) and module.groups == module.out_channels > 1:
            depthwise.append(name)
        elif isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1
        ):
            if whole:
                layers.append(name)
            else:
                inputs[name] = (torch.tensor(index), torch.tensor(root))
        elif any(True for _ in module.parameters()):
            return None
    if not layers or not inputs:
        return None
    parts = [tuple(sorted(set(part))) for part in (layers, norms, depthwise, inputs)]
    return _Set(Coupled(width, *parts), inputs)


def _dead(x: Coupled, modules: Mapping[str, nn.Module]) -> Tensor:
    """Channels that carry the same whatever the input; the first one stays if all are."""
    rows = [modules[name].weight.detach().flatten(1).any(1) for name in x.layers]  # type: ignore
    dead = ~torch.stack(rows).any(0)
    if x.norms:
        scales = [modules[name].weight.detach() != 0 for name in x.norms]  # type: ignore
        dead |= ~torch.stack(scales).any(0)
    if bool(dead.all()):
        dead[0] = False
    return dead


def _means(model: nn.Module, readers: dict[str, nn.Module], example: Tensor) -> dict[str, Tensor]:
    """The mean of each reader's input by channel or feature, in eval mode."""
    means: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor) -> None:
        axis = 1 if isinstance(readers[name], nn.Conv2d) else -1
        means[name] = x.transpose(0, axis).flatten(1).double().mean(1)

    with observe_inputs(readers, watch), evaluating(model):
        model(example)
    return means


def _fold(module: nn.Module, gone: Tensor, mean: Tensor) -> None:
    """Put what the inputs that go contribute on average into the bias."""
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    weight = module.weight.double().flatten(2).sum(2) if module.weight.dim() > 2 else module.weight
    shift = weight.double() @ (mean * gone)
    if not bool(shift.any()):
        return
    if module.bias is None:
        module.bias = nn.Parameter(
            torch.zeros_like(module.weight[:, 0].reshape(len(shift), -1)[:, 0])
        )
    module.bias.add_(shift.to(module.bias.dtype))


def _cut_outputs(module: nn.Module, keep: Tensor) -> None:
    """Leave only these output channels."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        _slice(module, name, keep)
    width = int(keep.sum())
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            module.groups = module.in_channels = width
        module.out_channels = width
    elif isinstance(module, nn.Linear):
        module.out_features = width
    else:
        module.num_features = width  # type: ignore[assignment]


def _cut_inputs(module: nn.Module, keep: Tensor) -> None:
    """Leave only these inputs."""
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    module.weight = nn.Parameter(module.weight[:, keep], module.weight.requires_grad)
    if isinstance(module, nn.Conv2d):
        module.in_channels = int(keep.sum())
    else:
        module.in_features = int(keep.sum())


def _slice(module: nn.Module, name: str, keep: Tensor) -> None:
    value = getattr(module, name, None)
    if isinstance(value, nn.Parameter):
        setattr(module, name, nn.Parameter(value[keep], value.requires_grad))
    elif isinstance(value, Tensor):
        setattr(module, name, value[keep])


def _inputs(module: nn.Module) -> int:
    return module.weight.shape[1]  # type: ignore


def _measure(model: nn.Module, example: Tensor) -> tuple[Tensor, int, int]:
    """Output, number of parameters, flops of one forward pass in eval mode."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        output = model(example)
    if not isinstance(output, Tensor):
        raise UsageError("the model returns no single tensor; wrap it so that it does")
    return output, sum(p.numel() for p in model.parameters()), counter.get_total_flops()
