"""Which channels hang together, read off the graph that torch-pruning traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gossamer.core.coupling import Coupled
from gossamer.core.errors import MissingExtra, UsageError
from gossamer.core.matrix import why_not_plain
from gossamer.engine.hooks import observe_inputs
from gossamer.engine.prune.agreement import clone, fenced, one_line, outputs, tensors

_ROUNDS = 32
"""How often a module may be met with other channels before a walk through the graph is given up."""


@dataclass(frozen=True, eq=False)
class ChannelSet:
    """One set of the trace.

    plain: batch norms without a scale, instance norms and PReLU over the channels. inputs: by reader its input
    index and the channel that it carries, as two tensors. after: by writer, norm and depthwise
    layer those norms and depthwise layers that take what it gives; None is any other taker.
    passes: operations on the way. reason: why the channels cannot be cut, empty where they can.
    """

    coupled: Coupled
    plain: tuple[str, ...]
    inputs: Mapping[str, tuple[Tensor, Tensor]]
    after: Mapping[str, tuple[str | None, ...]]
    passes: tuple[str, ...]
    reason: str

    @property
    def name(self) -> str:
        """The first layer that writes the channels."""
        return self.coupled.layers[0]

    @property
    def members(self) -> tuple[str, ...]:
        """Every layer whose output channels are cut."""
        x = self.coupled
        return (*x.layers, *x.norms, *x.depthwise, *self.plain)


@dataclass(frozen=True, eq=False)
class _Trace:
    modules: Mapping[str, nn.Module]
    names: Mapping[int, str]
    calls: Mapping[str, int]
    shared: Mapping[int, list[str]]
    graph: Any


def trace(model: nn.Module, example: Tensor) -> list[ChannelSet]:
    """Every set of output channels of a Linear or Conv2d, also those that cannot be cut.

    Traced on a copy. Raises MissingExtra without torch-pruning, UsageError where it fails or the example is no
    tensor.
    """
    try:
        import torch_pruning
    except ImportError:
        raise MissingExtra("torch-pruning", "structured") from None
    with torch.inference_mode(False):
        _check(model, example)
        return list(_sets(_traced(torch_pruning.DependencyGraph(), clone(model), example.clone())))


def _check(model: nn.Module, example: Tensor) -> None:
    """Raise UsageError unless the model runs on the example and its layers can be seen."""
    if not isinstance(example, Tensor) or not example.numel():
        raise UsageError("the example is one tensor, not empty; wrap a model that takes more")
    if any(isinstance(x, torch.jit.ScriptModule) for x in model.modules()):
        raise UsageError("layers of torch.jit cannot be cut; give the model that was compiled")
    try:
        outputs(clone(model), [example])
    except Exception as error:
        raise UsageError(f"the model fails on the example: {one_line(error)}") from error


def _traced(graph: Any, reference: nn.Module, example: Tensor) -> _Trace:
    """The dependencies, traced on this copy, which must not be used again."""
    named = dict(reference.named_modules())
    calls: Counter[str] = Counter()
    counted = {name: module for name, module in named.items() if kind(module)}
    try:
        for parameter in reference.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad(), fenced(example.device), observe_inputs(
            counted, lambda name, _: calls.update([name])
        ):  # fmt: skip
            graph.build_dependency(
                reference.eval(),
                example_inputs=example,
                forward_fn=lambda net, x: net(x),
                output_transform=lambda out: [t for t in tensors(out) if t.grad_fn is not None],
                verbose=False,
            )
    except Exception as error:
        raise UsageError(
            f"torch-pruning cannot trace the model ({one_line(error)}); give the part of it that can "
            "be traced, with an example of that part's input"
        ) from error
    names = {id(module): name for name, module in named.items()}
    return _Trace(named, names, calls, _owners(reference), graph)


def kind(module: nn.Module) -> str:
    """How a layer is cut: linear, conv, depthwise, norm, or plain, which works channel by channel
    but is no batch norm with a scale; empty for what is not served.

    A layer is known by the forward that its class runs, never by its base class.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return "linear"
    if forward is nn.Conv2d.forward:
        assert isinstance(module, nn.Conv2d)
        if type(module)._conv_forward is not nn.Conv2d._conv_forward:
            return ""
        if module.groups == 1:
            return "conv"
        return "depthwise" if module.groups == module.in_channels == module.out_channels else ""
    if forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return "norm" if module.affine else "plain"
    return "plain" if forward in (_InstanceNorm.forward, nn.PReLU.forward) else ""


def obstacle(module: nn.Module) -> str:
    """Why a layer cannot be cut though its class is known; empty where it can."""
    for key in ("weight", "bias"):
        if isinstance(getattr(module, key, None), Tensor) and key not in module._parameters:
            return why_not_plain(module, key) or ""
    if "forward" in vars(module):
        return "its forward is replaced; restore it first"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has a forward hook; remove it first"
    return ""


class _Index(NamedTuple):
    """A channel where it is, and the channel of the root that it carries."""

    idx: int
    root_idx: int


@dataclass(frozen=True, eq=False)
class _Item:
    """What must go from one module when the root's channels go, of its outputs or its inputs."""

    module: Any
    writes: bool
    index: list[int]
    root: list[int]


def _sets(found: _Trace) -> Iterator[ChannelSet]:
    seen: set[int] = set()
    for module in list(found.graph.module2node):
        pruner = found.graph.get_pruner_of_module(module)
        if not isinstance(module, nn.Conv2d | nn.Linear) or id(module) in seen or not pruner:
            continue
        items, tangled = _walk(module, pruner.prune_out_channels, found.graph)
        seen |= {id(x.module) for x in items if x.writes}
        yield _set(items, tangled, found)


def _walk(module: Any, handler: Any, graph: Any) -> tuple[list[_Item], bool]:
    """All that depends on the output channels of a module, the module itself first.

    Also returns whether the walk was given up: slices and concatenations that torch-pruning misread
    can shift the channels further at every round.
    """
    width = _outputs(module, 0)
    root = tuple(_Index(i, i) for i in range(width))
    seen: dict[Any, set[tuple[_Index, ...]]] = {(graph.module2node[module], handler): {root}}
    stack = [(graph.module2node[module], handler, root)]
    tangled = False
    while stack:
        node, trigger, index = stack.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(trigger):
                continue
            mapped: Any = list(index)
            for mapping in dependency.index_mapping:
                mapped = mapping(mapped) if mapping is not None else mapped
            key, one = (dependency.target, dependency.handler), tuple(map(_pair, mapped))
            known = seen.setdefault(key, set())
            if not one or one in known:
                continue
            tangled = tangled or len(known) >= _ROUNDS
            if not tangled:
                known.add(one)
                stack.append((*key, one))
    return [_item(node, handler, known, graph) for (node, handler), known in seen.items()], tangled


def _pair(index: Any) -> _Index:
    return _Index(int(index.idx), int(index.root_idx))


def _item(node: Any, handler: Any, known: set[tuple[_Index, ...]], graph: Any) -> _Item:
    merged: dict[int, int] = {}
    for part in sorted(known):
        for index in part:
            merged.setdefault(*index)
    writes = graph.is_out_channel_pruning_fn(handler)
    return _Item(node.module, writes, list(merged), list(merged.values()))


def _set(items: Sequence[_Item], tangled: bool, found: _Trace) -> ChannelSet:
    parts: dict[str, list[str]] = {"layers": [], "norm": [], "depthwise": [], "plain": []}
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    reasons, passes = ["slices or concatenations tie them to one another"] if tangled else [], []
    width = len(items[0].index)
    for x in items:
        module = x.module
        name = found.names.get(id(module))
        if name is None:
            passes.append(_operation(module))
            if isinstance(module, nn.Parameter):
                reasons.append("a parameter of no known layer runs along them")
            continue
        whole = x.index == x.root and len(x.index) == width == _outputs(module, width)
        reasons.append(_member(name, module, found, whole or not x.writes))
        which = kind(module)
        if which in ("linear", "conv") and not x.writes:
            inputs[name] = (torch.tensor(x.index), torch.tensor(x.root))
        elif which in ("linear", "conv"):
            parts["layers"].append(name)
        elif which and whole:
            parts[which].append(name)
    if not parts["layers"]:  # the root is a layer that is not served
        parts["layers"].append(found.names[id(items[0].module)])
    if not inputs:
        reasons.append("no Linear or Conv2d reads them: they reach the model's output")
    reasons += [_reader(name, index, found) for name, (index, _) in inputs.items()]
    sides = [tuple(sorted(set(part))) for part in (*parts.values(), inputs)]
    layers, norms, depthwise, plain, readers = sides
    return ChannelSet(
        Coupled(width, layers, norms, depthwise, readers),
        plain,
        inputs,
        _after((*layers, *norms, *depthwise), {*norms, *depthwise}, {*plain}, found),
        tuple(dict.fromkeys(x for x in passes if x)),
        next((reason for reason in reasons if reason), ""),
    )


def _member(name: str, module: nn.Module, found: _Trace, whole: bool) -> str:
    """Why this member stops its set; empty where it does not."""
    label = f"{name} ({type(module).__name__})"
    which = kind(module)
    if not which:
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        text = (
            "a grouped convolution is not cut"
            if grouped
            else "it is no kind of layer that can be cut along"
        )
        return f"{label}: {text}"
    stop = obstacle(module)
    if stop:
        return f"{label}: {stop}"
    if found.calls[name] > 1:
        return f"{label}: it runs {found.calls[name]} times in one forward"
    for parameter in module.parameters(recurse=False):
        others = [x for x in found.shared[id(parameter)] if x != name]
        if others:
            return f"{label}: it shares a parameter with {others[0] or 'the model itself'}"
    return "" if whole else f"{label}: it holds these channels beside or among others"


def _outputs(module: nn.Module, width: int) -> int:
    """How many output channels a layer has; `width` where it works for any number."""
    if isinstance(module, nn.PReLU):
        return width if module.num_parameters == 1 else module.num_parameters
    if isinstance(module, nn.Linear):
        return module.out_features
    count = getattr(module, "out_channels", getattr(module, "num_features", width))
    return int(count)


def _reader(name: str, index: Tensor, found: _Trace) -> str:
    """Why the channels cannot be told apart in what a reader is given; empty where they can."""
    width = int(found.modules[name].weight.shape[1])  # type: ignore[index]
    if int(index.max()) < width:
        return ""
    return f"{name} reads {width} inputs, into which an operation on the way has merged them"


def _after(
    names: tuple[str, ...], gates: set[str], plain: set[str], found: _Trace
) -> dict[str, tuple[str | None, ...]]:
    """By name the gates that take its output, past what is plain or has no name; None for others."""
    by_name = {
        found.names.get(id(module)): node for module, node in found.graph.module2node.items()
    }

    def takers(node: Any) -> Iterator[str | None]:
        stack, seen = list(node.outputs), set()
        if not stack:  # the model's output
            yield None
        while stack:
            one = stack.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            name = found.names.get(id(one.module))
            if name is not None and name not in plain:
                yield name if name in gates else None
            elif one.outputs:
                stack.extend(one.outputs)
            else:
                yield None

    return {n: tuple(dict.fromkeys(takers(by_name[n]))) for n in names if n in by_name}


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold each parameter."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _operation(module: Any) -> str:
    """The name of an anonymous operation of the graph, as autograd calls it."""
    name = str(getattr(module, "_grad_fn", ""))
    return name.split("Backward")[0]
