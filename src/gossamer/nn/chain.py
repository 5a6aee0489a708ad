"""Convolutions in a row run as one: batch norms folded, activations fused, nothing stored anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.matrix import as_matrix
from gossamer.nn.packed.conv import (
    DepthwiseConv2d,
    PackedConv2d,
    no_kernel,
    serves_depthwise,
    window_of,
)
from gossamer.nn.packed.places import put, why_not_here
from gossamer.ops import _dispatch
from gossamer.ops import conv as ops
from gossamer.ops.conv import Depthwise, Epilogue, Stage, Window
from gossamer.ops.prepared import FREE

Step = Callable[[Tensor], Tensor]
SHALLOW = 4
"""A dense convolution of up to so many input channels, the first of most networks, joins in."""


class ConvChain(nn.Sequential):
    """A Sequential with the same children under the same names, which runs its convolutions fused.

    In eval mode and without gradients every `PackedConv2d` and `DepthwiseConv2d`, and a dense Conv2d
    of few channels, takes the batch norm and the ReLU or ReLU6 behind it along, and a 1x1
    convolution the depthwise one before it. Folded weights are copies, made anew when the originals
    change. In training mode, under autocast, while compiling or tracing, for other images than
    float32, and where a child has hooks or a forward of its own, the children run as they are. Only
    exact types are taken along: a subclass may do more. `fuse` makes one of a Sequential in place.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As Sequential's, to rounding."""
        if self.training or torch.is_grad_enabled() or not _dispatch.plain(input):
            return super().forward(input)
        inside = list(self.modules())[1:]
        if input.dtype != torch.float32 or input.dim() != 4 or watched(inside):
            return super().forward(input)
        leaves = list(_leaves(self))
        version = (_dispatch.isa_index(), *_state(leaves))
        plan: tuple[tuple[object, ...], list[Step]] | None = self.__dict__.get("_plan")
        if plan is None or plan[0] != version:
            self.__dict__["_plan"] = plan = (version, _steps(leaves))
        for step in plan[1]:
            input = step(input)
        return input

    def __getstate__(self) -> dict[str, object]:
        """Without the plan, which is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


def fuse(model: nn.Module) -> list[str]:
    """Suit everything to the packed convolutions of a model, in place; nothing where it has none.

    Each 3x3 depthwise Conv2d becomes a `DepthwiseConv2d`, each Sequential that holds either kind
    and is not inside another a `ConvChain`. Modules with a forward of their own stay as they are,
    and so does the state dict. Returns the names of all depthwise convolutions.
    """
    if not any(isinstance(module, PackedConv2d) for module in model.modules()):
        return []
    names = []
    for name, module in list(model.named_modules()):
        if name and why_not_here(model, name, module) is None and serves_depthwise(module):
            put(model, module, DepthwiseConv2d(module))
            names.append(name)
        elif isinstance(module, DepthwiseConv2d):
            names.append(name)
    for module in list(_outermost(model)):
        served = any(isinstance(leaf, PackedConv2d | DepthwiseConv2d) for leaf in _leaves(module))
        if served and type(module) is nn.Sequential:
            module.__class__ = ConvChain
    return names


def unfuse(model: nn.Module) -> None:
    """Make every `ConvChain` an ordinary Sequential again, in place."""
    for module in model.modules():
        if type(module) is ConvChain:
            module.__dict__.pop("_plan", None)
            module.__class__ = nn.Sequential  # type: ignore[assignment]


def watched(modules: Iterable[nn.Module]) -> bool:
    """Whether hooks, or a forward put in place of the class's, wait for calls of these modules."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)


def _sequential(module: nn.Module) -> bool:
    """Whether it does nothing but call its children one after the other."""
    kind: Any = type(module)
    if kind is ConvChain or kind is nn.Sequential:
        return "forward" not in vars(module)
    known = issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward
    known = known and kind.__iter__ is nn.Sequential.__iter__
    return known and kind.__call__ is nn.Module.__call__ and "forward" not in vars(module)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Sequentials inside no other, except through a module with a forward of its own."""
    chained = _sequential(module)
    if chained:
        yield module
    for child in _leaves(module) if chained else module.children():
        yield from _outermost(child)


def _leaves(chain: nn.Module) -> Iterator[nn.Module]:
    """What runs one after the other."""
    for child in chain.children():
        if _sequential(child):
            yield from _leaves(child)
        else:
            yield child


def _state(leaves: list[nn.Module]) -> tuple[object, ...]:
    """Changes when a tensor that the plan copied is written to or replaced, or a mode changes."""
    found: list[object] = []
    for leaf in leaves:
        found += (id(leaf), leaf.training)
        for tensors in (leaf._parameters, leaf._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    version = 0 if tensor.is_inference() else tensor._version
                    found += (tensor.data_ptr(), version)
    return tuple(found)


@dataclass
class _Convolution:
    """A leaf's matrix (out, depth) or depthwise weight, with what follows it folded in."""

    weight: Tensor
    bias: Tensor | None
    window: Window
    depthwise: bool
    low: float = FREE[0]
    high: float = FREE[1]

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.bias, self.low, self.high)

    def absorb(self, module: nn.Module) -> bool:
        """Take what follows along, where that is possible."""
        free = (self.low, self.high) == FREE
        if _inert(module):
            return True
        if free and type(module) is nn.BatchNorm2d and _normalises(module, self.weight):
            self._fold(module)
        elif type(module) in (nn.ReLU, nn.ReLU6) and free:
            self.low, self.high = 0.0, 6.0 if type(module) is nn.ReLU6 else math.inf
        else:
            return False
        return True

    def _fold(self, norm: nn.BatchNorm2d) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.detach()
        shift = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        shift = shift * scale
        self.bias = shift if norm.bias is None else shift + norm.bias.detach()
        self.weight = self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1))


def _inert(module: nn.Module) -> bool:
    return type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d) and not module.training


def _normalises(norm: nn.BatchNorm2d, weight: Tensor) -> bool:
    """Whether it is a fixed affine map of as many float32 channels."""
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    found = [t for t in tensors if t is not None]
    fixed = not norm.training and norm.running_mean is not None and norm.running_var is not None
    fits = norm.num_features == weight.shape[0]
    return fixed and fits and all(t.dtype == torch.float32 and t.is_cpu for t in found)


def _convolution(leaf: nn.Module) -> _Convolution | None:
    if isinstance(leaf, PackedConv2d) and leaf.window.stride[1] <= 2:
        weight, window, depthwise = leaf.to_matrix().float(), leaf.window, False
    elif isinstance(leaf, DepthwiseConv2d):
        weight, window, depthwise = (
            leaf.weight.detach(),
            Window((3, 3), (leaf.step, leaf.step)),
            True,
        )
    elif type(leaf) is nn.Conv2d and leaf.in_channels <= SHALLOW and no_kernel(leaf) is None:
        weight, window, depthwise = as_matrix(leaf), window_of(leaf), False
    else:
        return None
    bias = leaf.bias
    return _Convolution(weight, None if bias is None else bias.detach().float(), window, depthwise)


def _steps(leaves: list[nn.Module]) -> list[Step]:
    """What runs: stages in a row as one, other modules as they are."""
    steps: list[Step] = []
    stages: list[Stage] = []
    waiting = list(leaves)
    while waiting:
        leaf = waiting.pop(0)
        found = _convolution(leaf)
        if found is None:
            if not _inert(leaf):
                steps += [ops.chain(stages), leaf] if stages else [leaf]
                stages = []
            continue
        while waiting and found.absorb(waiting[0]):
            waiting.pop(0)
        stages = _joined(stages, found)
    return [*steps, ops.chain(stages)] if stages else steps


def _joined(stages: list[Stage], found: _Convolution) -> list[Stage]:
    """With one more; a 1x1 convolution joins a depthwise one that came last."""
    if found.depthwise:
        first = Depthwise(found.weight.contiguous(), found.window.stride[0], found.epilogue)
        return [*stages, Stage(None, Window(), found.epilogue, first)]
    prologue: Depthwise | None = None
    if stages and stages[-1].form is None and found.window == Window():
        stages, prologue = stages[:-1], stages[-1].prologue
    return [*stages, Stage(ops.build(found.weight), found.window, found.epilogue, prologue)]
