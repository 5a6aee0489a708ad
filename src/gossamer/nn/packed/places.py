"""Packed layers in the places of ordinary ones: when they may go there, how, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.matrix import is_transposed, why_not_plain
from gossamer.nn.packed.base import PackedLayer
from gossamer.nn.packed.conv import DepthwiseConv2d
from gossamer.nn.packed.readers import who_reads

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_non_full_backward_hooks",
)
"""What a module keeps of hooks on its calls."""
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Hooks on what is saved, which know the names of the layer replaced."""


def why_not_here(root: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why no packed layer can stand at `name` of a model, whatever its zeros; None where one can.

    The layer must compute the plain product of a weight of its own, and nothing around it may read
    that weight in its stead.
    """
    if (reason := why_not_plain(module)) is not None:
        return reason
    if any(getattr(module, hooks, None) for hooks in _STATE_HOOKS):
        return "it has hooks on its state dict, which know an ordinary weight"
    weight: Any = module.weight
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if _extra_names(module) & _RESERVED:
        return "it has a tensor or module of its own under a name that packed layers use"
    if (reader := who_reads(root, name)) is not None:
        return f"its parent multiplies or changes the weight itself, in {reader}"
    return None


_RESERVED = frozenset(
    {"values", "bitmap", "row_ptr", "columns", "codes", "scales", "zeros", "offsets", "typed",
     "outlier_ptr", "outlier_cols", "outlier_values", "norms", "down", "up", "turns"}
)  # fmt: skip
"""Names of the tensors of packed layers."""


def _extra_names(module: nn.Module) -> set[str]:
    """Of tensors and modules that someone else registered on the layer."""
    found = {*module._parameters, *module._buffers, *module._modules}
    return found - {"weight", "bias"}


def put(root: nn.Module, module: nn.Module, packed: PackedLayer | DepthwiseConv2d) -> None:
    """Put a packed layer wherever `module` stands in the model, and give it what was the layer's.

    That is its mode, its hooks (handles that were given out go on working), attributes, tensors
    and modules that others set on it. Layers that share a module share the packed one.
    """
    packed.own = frozenset(vars(packed)) - frozenset(vars(module)) | {"own", "kind"}
    packed.kind = type(module)
    if isinstance(packed, PackedLayer):
        packed.own |= {"transposed", "trains"}
        packed.transposed = is_transposed(module)
        packed.trains = bool(getattr(module.weight, "requires_grad", True))
    _hand_over(module, packed, frozenset())
    _exchange(root, module, packed)


def take_back(root: nn.Module, packed: PackedLayer | DepthwiseConv2d) -> nn.Module:
    """Put an ordinary layer with the unpacked weight wherever a packed one stands; returns it."""
    layer = _ordinary(packed)
    weight: Any = packed.weight
    if isinstance(packed, PackedLayer):
        weight = nn.Parameter(packed.dense_weight(), packed.trains)
    layer._parameters["weight"], layer._parameters["bias"] = weight, packed.bias
    _hand_over(packed, layer, packed.own or frozenset(vars(packed)))
    _exchange(root, packed, layer)
    return layer


def _ordinary(packed: PackedLayer | DepthwiseConv2d) -> Any:
    """An empty layer of the class that was replaced, or of torch's for one that replaced none."""
    if packed.kind is not None:
        layer = packed.kind.__new__(packed.kind)
        nn.Module.__init__(layer)
        return layer
    if isinstance(packed, DepthwiseConv2d):
        channels = packed.weight.shape[0]
        return nn.Conv2d(channels, channels, 3, packed.step, 1, groups=channels, device="meta")
    shape, window = packed.weight_shape, getattr(packed, "window", None)
    if window is None:
        return nn.Linear(shape[1], shape[0], device="meta")
    facts = (window.kernel, window.stride, window.padding)
    return nn.Conv2d(shape[1], shape[0], *facts, device="meta")


def _hand_over(old: nn.Module, new: nn.Module, skip: frozenset[str]) -> None:
    """Mode, hooks and what others set, but for attributes in `skip` and those that `new` has."""
    new.training = old.training
    for name in _HOOKS:
        if name in vars(old):
            new.__dict__[name] = vars(old)[name]
    for key, value in vars(old).items():
        if key not in skip and key not in vars(new):
            new.__dict__[key] = value
    own = {"weight", "bias"} | (_RESERVED if isinstance(old, PackedLayer) else set())
    for part in ("_parameters", "_buffers", "_modules"):
        for key, held in vars(old)[part].items():
            if key not in own:
                vars(new)[part][key] = held
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set - own


def _exchange(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(root.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def take_all_back(root: nn.Module) -> nn.Module:
    """`take_back` for every packed layer; the model, or what takes the place of one such layer."""
    kinds = PackedLayer | DepthwiseConv2d
    with torch.no_grad():
        for packed in [module for module in root.modules() if isinstance(module, kinds)]:
            layer = take_back(root, packed)
            root = layer if packed is root else root
    return root
