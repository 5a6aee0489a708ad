"""Memory for a cache whose keys are read here and there."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_LARGE = 2 << 20
"""Bytes of a large page."""


def room(
    shape: tuple[int, int, int], width: int, value_width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys (batch, kv_heads, tokens, width) and values, for `decode` with chosen keys; not filled.

    Each key lies beside its value, so that both are one stretch of memory, and in large pages where
    the system has them: reading here and there in small ones waits for the addresses of pages.
    """
    count = math.prod(shape) * (width + value_width)
    both = _bytes(count * dtype.itemsize).view(dtype).reshape(*shape, width + value_width)
    return both[..., :width], both[..., width:]


def _bytes(count: int) -> Tensor:
    """uint8 (count,), in large pages if there is use and a way."""
    if count < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.uint8)
    whole = -(-count // _LARGE) * _LARGE
    area = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)[:count]
