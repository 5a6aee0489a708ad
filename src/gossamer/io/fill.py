"""What was read takes its places in a model; everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.matrix import as_matrix, is_prunable, is_transposed
from gossamer.io.layers import Packed
from gossamer.io.stored import Stored, unpack
from gossamer.nn import ActiveLinear, BitmapLinear, NMLinear, PackedConv2d, QuantizedLinear
from gossamer.nn.kernel_choice.decide import FAMILIES, why_dense
from gossamer.nn.kernel_choice.latency import Predictor
from gossamer.nn.packed.base import PackedLayer
from gossamer.nn.packed.conv import no_kernel
from gossamer.nn.packed.places import put, why_not_here


@dataclass
class Content:
    """What a folder holds: packed layers, stored tensors, and all others under their names.

    kernels: of packed convolutions. parts: values and bitmap of every stored tensor.
    """

    layers: dict[str, Packed]
    kernels: dict[str, tuple[int, int] | None]
    tensors: dict[str, Tensor]
    stored: dict[str, Stored] = field(default_factory=dict)
    parts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def check(root: nn.Module, content: Content) -> None:
    """Raise FormatError unless the content fits the model: every name, shape and kind of number.

    Raises UsageError for a model whose layers are packed already.
    """
    for name, module in root.named_modules():
        if isinstance(module, PackedLayer):
            raise UsageError(
                f"model= is an instance to fill, but its layer {name} is packed: pass a new one, or "
                "call gossamer.unpack(model) first"
            )
    modules = dict(root.named_modules())
    for name, layer in content.layers.items():
        _check_layer(name, modules.get(name), layer, content.kernels[name])
    present = {name: (tuple(t.shape), t.is_floating_point()) for name, t in content.tensors.items()}
    present |= {name: (facts.shape, True) for name, facts in content.stored.items()}
    check_tensors(root, content.layers, present)


def check_tensors(
    root: nn.Module, layers: Iterable[str], present: Mapping[str, tuple[tuple[int, ...], bool]]
) -> None:
    """Raise FormatError unless these tensors, by shape and whether they hold floating numbers, are
    those of the model without the named layers."""
    wanted = _wanted(root, layers)
    for name in sorted(wanted.keys() | present.keys()):
        if name not in wanted:
            raise FormatError(f"tensor {name}: not part of the model")
        if name not in present:
            continue
        shape, floating = present[name]
        if shape != tuple(wanted[name].shape):
            raise FormatError(f"tensor {name}: {shape}, not {tuple(wanted[name].shape)}")
        if floating != wanted[name].is_floating_point():
            found = "floating numbers" if floating else "whole numbers"
            raise FormatError(f"tensor {name}: holds {found}, not {wanted[name].dtype}")
    if missing := _missing(root, wanted, present):
        raise FormatError(f"tensor {missing[0]}: missing from the files")


def _check_layer(
    name: str, module: nn.Module | None, layer: Packed, kernel: tuple[int, int] | None
) -> None:
    fits = module is not None and is_prunable(module) and not isinstance(module, nn.Embedding)
    if isinstance(module, nn.Conv2d):
        fits = fits and isinstance(layer, BitmapLinear) and not no_kernel(module)
        fits = fits and module.kernel_size == (kernel or (1, 1))
    else:
        fits = fits and kernel is None
    shape = (layer.out_features, layer.in_features)
    if not fits or as_matrix(module).shape != shape:  # type: ignore[arg-type]
        raise FormatError(f"layer {name}: the model has no linear layer of that shape there")


def _wanted(root: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """The state dict without the tensors of the layers, under whatever names these stand."""
    modules = dict(root.named_modules(remove_duplicate=False))
    packed = {id(modules[name]) for name in layers if name in modules}
    inside = {name for name, module in modules.items() if id(module) in packed}
    return {k: v for k, v in root.state_dict().items() if k.rpartition(".")[0] not in inside}


def _missing(
    root: nn.Module, wanted: Mapping[str, Tensor], present: Mapping[str, Any]
) -> list[str]:
    """Names without a tensor, other than those tied to one that is there."""
    parameters = dict(root.named_parameters(remove_duplicate=False))
    known = {id(parameters[name]) for name in present if name in parameters}
    tied = getattr(root, "all_tied_weights_keys", None) or {}
    tied = tied if isinstance(tied, dict) else {}
    return [
        name
        for name in wanted
        if name not in present
        and not (name in parameters and id(parameters[name]) in known)
        and tied.get(name) not in present
    ]


def fill(root: nn.Module, content: Content, latency: Predictor | None, large_batches: bool) -> None:
    """Put the checked content into the model; what serves a layer is what is faster here.

    A layer that the dense product serves faster than any kernel gets its dense weight, and its
    `dense_reason` says why.
    """
    for name, layer in content.layers.items():
        serve(root, name, layer, content.tensors, latency, large_batches)
    for name, facts in content.stored.items():
        weight = unpack(name, facts, *content.parts.pop(name))
        if not (
            facts.served
            and serve_dense(root, name, weight, content.tensors, latency, large_batches)
        ):
            content.tensors[name] = weight
    on_meta = any(t.is_meta for t in root.state_dict().values())
    root.load_state_dict(content.tensors, strict=False, assign=on_meta)
    tie: Any = getattr(root, "tie_weights", None)
    if tie is not None:
        tie()
    kind = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    for module in root.modules():  # integers do not tell the dtype of what they stand for
        if isinstance(module, QuantizedLinear | ActiveLinear):
            module.typed = module.typed.to(kind)


def serve(
    root: nn.Module,
    name: str,
    layer: Packed,
    tensors: dict[str, Tensor],
    latency: Predictor | None,
    large_batches: bool,
) -> None:
    """Put the packed layer in its place, or its dense weight among `tensors`."""
    module: Any = root.get_submodule(name)
    packed: PackedLayer = layer
    if isinstance(module, nn.Conv2d) and isinstance(layer, BitmapLinear):
        packed = PackedConv2d.from_conv(module, layer)
    reason = why_not_here(root, name, module)
    if reason is None and isinstance(packed, BitmapLinear | NMLinear | PackedConv2d):
        reason = why_dense(packed, latency, large_batches, type(root).__name__ not in FAMILIES)
    if reason is None:
        put(root, module, packed)
        return
    module.dense_reason = reason
    packed.transposed = is_transposed(module)
    tensors[f"{name}.weight"] = packed.dense_weight()
    if layer.bias is not None:
        tensors[f"{name}.bias"] = layer.bias.detach()


def serve_dense(
    root: nn.Module,
    name: str,
    weight: Tensor,
    tensors: dict[str, Tensor],
    latency: Predictor | None,
    large_batches: bool,
) -> bool:
    """Whether a linear layer's stored weight went behind a kernel, dense where it was written."""
    path, _, own = name.rpartition(".")
    module = root.get_submodule(path) if path else root
    linear = own == "weight" and (isinstance(module, nn.Linear) or is_transposed(module))
    if not path or not linear or why_not_here(root, path, module) is not None:
        return False
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    matrix = weight.t().contiguous() if is_transposed(module) else weight
    bias: Any = tensors.get(f"{path}.bias", module.bias)
    packed = BitmapLinear.from_matrix(matrix, bias)
    serve(root, path, packed, {}, latency, large_batches)
    if root.get_submodule(path) is not packed:
        return False
    tensors.pop(f"{path}.bias", None)
    return True


def convert(root: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of what is stored; computed buffers (rotary frequencies) keep theirs."""
    for module in root.modules():
        skipped = module._non_persistent_buffers_set
        if isinstance(module, QuantizedLinear):
            module.typed = module.typed.to(dtype)
            skipped = skipped | module._buffers.keys()
        if isinstance(module, ActiveLinear):
            module.typed = module.typed.to(dtype)
            skipped = skipped | {"norms", "scales"}
        for parts in (module._parameters, module._buffers):
            for name, tensor in parts.items():
                if tensor is None or name in skipped or not tensor.is_floating_point():
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.to(dtype)
                else:
                    module._buffers[name] = tensor.to(dtype)
        if isinstance(module, ActiveLinear):
            module.follow()


def reasons_of(root: nn.Module) -> dict[str, str]:
    """The layers that `fill` left dense because that is faster here, each with the reason."""
    found = {name: getattr(module, "dense_reason", None) for name, module in root.named_modules()}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}
