"""The weight of a packed layer as a tensor that is unpacked when its numbers are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gossamer.core.errors import UsageError

_FACTS = frozenset(
    {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "nelement", "layout", "is_cpu",
     "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_mps",
     "requires_grad", "is_leaf", "grad_fn", "grad", "element_size", "itemsize", "nbytes",
     "is_floating_point", "is_complex", "get_device", "__len__", "names", "_is_view",
     "is_inference"}
)  # fmt: skip
"""What is known without the numbers."""
_SAME = frozenset({"detach", "data"})
"""What gives the same weight again."""


class LazyWeight(Tensor):
    """A read-only dense weight; shape, dtype and device cost nothing, anything else unpacks it.

    It is unpacked once for each object, so a module that reads `layer.weight` in its forward pays
    for it in every call.
    """

    unpack: Callable[[], Tensor]
    found: Tensor | None

    @staticmethod
    def make(unpack: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> LazyWeight:
        """The weight that `unpack()` gives, of dtype and device of `like`."""
        weight: LazyWeight = Tensor._make_wrapper_subclass(
            LazyWeight, shape, dtype=like.dtype, device=like.device
        )
        weight.unpack, weight.found = unpack, None
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer from what is known, refuse to write, else unpack."""
        name = _name(func)
        first = args[0] if args else None
        if isinstance(first, LazyWeight):
            if name in _SAME:
                return first
            if name in _FACTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs or {})
            if name in ("requires_grad_", "requires_grad=") and not (*args[1:], True)[0]:
                return first
            if _writes(name):
                raise UsageError(
                    "the weight of a packed layer cannot be written to: call "
                    "gossamer.unpack(model) first, or leave the layer out with compress(exclude=)"
                )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Unpack, for what comes by another way."""
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))


def _name(func: Any) -> str:
    """Of a function of torch; of an attribute's setter with `=` behind it."""
    name = str(getattr(func, "__name__", ""))
    if name not in ("__get__", "__set__"):
        return name
    return func.__self__.__name__ + ("=" if name == "__set__" else "")


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.endswith("=") or name == "__setitem__" or name.startswith("__i")


def _dense(value: Any) -> Any:
    if not isinstance(value, LazyWeight):
        return value
    if value.found is None:
        value.found = value.unpack()
    return value.found
