"""Which models can be written, and the names of their tensors without those of wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError

_INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""Modules of torch that only wrap another, by class, with the name they give it."""


def plain_names(root: nn.Module) -> Callable[[str], str]:
    """A function that takes the names of wrappers out of the name of a layer or tensor.

    `layers.0._orig_mod.weight` is `layers.0.weight` in the model that is loaded.
    """
    inner = [
        (f"{path}.{_INNER[type(module).__name__]}" if path else _INNER[type(module).__name__], path)
        for path, module in root.named_modules(remove_duplicate=False)
        if type(module).__name__ in _INNER and type(module).__module__.startswith("torch.")
    ]

    def plain(name: str) -> str:
        for wrapped, path in reversed(inner):
            if name == wrapped:
                name = path
            elif name.startswith(f"{wrapped}."):
                rest = name[len(wrapped) + 1 :]
                name = f"{path}.{rest}" if path else rest
        return name

    return plain


def check_savable(model: Any) -> None:
    """Raise UsageError for what no folder could hold, before anything is written."""
    if not isinstance(model, nn.Module):
        inside = [key for key, value in _parts(model).items() if isinstance(value, nn.Module)]
        hint = f"; save what it holds: .{', .'.join(inside[:4])}" if inside else ""
        raise UsageError(f"{type(model).__name__} is not a torch module{hint}")
    for name, module in model.named_modules():
        origin, kind = type(module).__module__, type(module).__name__
        if origin.partition(".")[0] == "peft":
            raise UsageError(
                f"{name or 'the model'} is {kind}: adapters are not saved. Merge them first, by "
                "gossamer.integrations.peft.merge_sparse or the adapter's own merge_and_unload()"
            )
        if "FullyShardedDataParallel" in kind or kind.startswith("FSDP"):
            raise UsageError(
                f"{name or 'the model'} is sharded by FSDP: gather its full state dict into an "
                "ordinary model on one rank and save that"
            )
    method = getattr(model, "quantization_method", None)
    if method is not None and str(getattr(method, "value", method)) != "gossamer":
        raise UsageError(f"its weights were quantised by {method}; call dequantize() first")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (reason := _without_numbers(tensor)) is not None:
            raise UsageError(f"{name} {reason}")


def _without_numbers(tensor: Tensor) -> str | None:
    """Why a tensor's numbers cannot be written as they are, and what to do first."""
    if nn.parameter.is_lazy(tensor):
        return "has no shape yet: run the model once before saving it"
    if tensor.is_meta:
        return (
            "is on the meta device, so it has no numbers (offloaded, or never loaded): load the "
            "model's weights before saving it"
        )
    if hasattr(tensor, "full_tensor"):
        return "is a DTensor, of which a rank holds a part: gather it by full_tensor() first"
    if tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
        return f"is a {type(tensor).__name__} of layout {tensor.layout}: make it dense first"
    return None


def _parts(model: Any) -> dict[str, Any]:
    components: Any = getattr(model, "components", None)  # of pipelines of diffusers
    return components if isinstance(components, dict) else getattr(model, "__dict__", {})
