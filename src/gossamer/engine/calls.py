"""What a module was called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.core.errors import UsageError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of one call of a module."""


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The tensor that a layer was called with; raises UsageError naming the layer if none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise UsageError(f"{name}: was called without a tensor, so it cannot be calibrated")


def without_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """The same arguments without key-value caches, which running a block would grow."""
    clean = {key: _no_cache(value) for key, value in kwargs.items()}
    if clean.get("use_cache"):
        clean["use_cache"] = False
    return tuple(_no_cache(value) for value in args), clean


def _no_cache(value: Any) -> Any:
    return None if hasattr(value, "get_seq_length") else value
