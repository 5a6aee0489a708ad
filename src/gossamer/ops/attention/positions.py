"""Positions in the original order, and heads that share what is given once for several."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import UsageError

_LIMIT = 2**31 - 1


def as_positions(name: str, given: Tensor | None, length: int) -> Tensor | None:
    """int32 (batch or 1, heads or 1, length), from that or from a vector."""
    if given is None:
        return None
    if given.dtype not in (torch.int32, torch.int64) or given.dim() not in (1, 3):
        raise UsageError(
            f"{name} are int64 (length,) or (batch, heads, length), not {given.dtype} "
            f"{tuple(given.shape)}"
        )
    if given.shape[-1] != length:
        raise UsageError(f"{given.shape[-1]} {name} for a length of {length}")
    found = given.reshape(1, 1, -1) if given.dim() == 1 else given
    if given.dtype == torch.int64 and given.numel() and not torch.compiler.is_compiling():
        low, high = int(given.min()), int(given.max())
        if low <= -_LIMIT or high >= _LIMIT:
            raise UsageError(f"{name} fit in 31 bits; found {low if low <= -_LIMIT else high}")
    return found.to(torch.int32).contiguous()


def default_positions(length: int, start: int, device: torch.device) -> Tensor:
    """int32 (1, 1, length): start, start + 1, ..."""
    return torch.arange(start, start + length, dtype=torch.int32, device=device).reshape(1, 1, -1)


def head_of(part: Tensor, batch: int, head: int, heads: int) -> Tensor:
    """The slice for one of `heads` heads of what may be shared by batches and by heads."""
    return part[batch % part.shape[0], head * part.shape[1] // heads]


def check_shared(name: str, shape: tuple[int, ...], batch: int, heads: int) -> None:
    """Raise UsageError unless (batch, heads, ...) can serve so many batches and heads."""
    if shape[0] not in (1, batch):
        raise UsageError(f"{name} for a batch of {shape[0]}, but the batch is {batch}")
    if shape[1] < 1 or heads % shape[1]:
        raise UsageError(f"{name} for {shape[1]} heads cannot be shared by {heads} heads")
