"""Checks of what `attention` and `decode` are given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.attention.layout import Layout
from gossamer.ops.attention.positions import as_positions, check_shared, default_positions


def compiled(query: Tensor) -> bool:
    """Whether the kernels serve such queries."""
    kinds = (torch.float32, torch.bfloat16)
    return query.is_cpu and query.dtype in kinds and _dispatch.isa_index() >= 0


def check_inputs(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> float:
    """The scale; raises UsageError where queries, keys and values do not fit each other."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or not x.is_floating_point():
            raise UsageError(
                f"{name} is floating (batch, heads, length, width), not {x.dtype} {tuple(x.shape)}"
            )
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        raise UsageError(
            f"query, key and value have one dtype and device, not {query.dtype}, {key.dtype} and "
            f"{value.dtype} on {query.device}, {key.device} and {value.device}"
        )
    if key.shape[:3] != value.shape[:3]:
        raise UsageError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in length")
    if query.shape[0] != key.shape[0]:
        raise UsageError(f"a batch of {query.shape[0]} queries and of {key.shape[0]} keys")
    if query.shape[3] != key.shape[3] or not query.shape[3] or not value.shape[3]:
        raise UsageError(
            f"queries of width {query.shape[3]}, keys of width {key.shape[3]}, values of width "
            f"{value.shape[3]}: the first two are equal and none is 0"
        )
    if not key.shape[1] or not query.shape[1] or query.shape[1] % key.shape[1]:
        raise UsageError(f"{query.shape[1]} heads are no multiple of {key.shape[1]} kv heads")
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise UsageError(f"scale is a finite number, not {scale}")
    return scale


def check_layout(layout: Layout, query: Tensor, keys: int, block_bias: Tensor | None) -> None:
    """Raise UsageError unless the layout is for such queries and keys."""
    batch, heads, queries = query.shape[:3]
    if (layout.queries, layout.keys) != (queries, keys):
        raise UsageError(
            f"a layout of {layout.queries} queries and {layout.keys} keys, but there are {queries} "
            f"and {keys}"
        )
    if layout.blocks.device != query.device:
        raise UsageError(f"a layout on {layout.blocks.device} for queries on {query.device}")
    check_shared("a layout", tuple(layout.offsets.shape), batch, heads)
    if layout.token_offsets is not None:
        check_shared("a token index", tuple(layout.token_offsets.shape), batch, heads)
    if block_bias is not None and block_bias.shape != layout.blocks.shape:
        raise UsageError(
            f"block_bias is {tuple(block_bias.shape)}, but the layout lists "
            f"{layout.blocks.numel()} tiles"
        )


def check_key_bias(key_bias: Tensor | None, query: Tensor, keys: int) -> None:
    """Raise UsageError unless it is (batch or 1, heads or a divisor, keys)."""
    if key_bias is None:
        return
    if key_bias.dim() != 3 or key_bias.shape[2] != keys:
        raise UsageError(f"key_bias is {tuple(key_bias.shape)}, not (batch, heads, {keys})")
    check_shared("key_bias", tuple(key_bias.shape), query.shape[0], query.shape[1])


def paired_positions(
    query: Tensor, keys: int, causal: bool, of_queries: Tensor | None, of_keys: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of queries and keys as the kernels take them, where causal; None otherwise."""
    batch, heads, queries = query.shape[:3]
    found: list[Tensor | None] = []
    for name, given, length, first in (
        ("query_positions", of_queries, queries, keys - queries),
        ("key_positions", of_keys, keys, 0),
    ):
        part = as_positions(name, given, length)
        if part is not None:
            check_shared(name, tuple(part.shape), batch, heads)
        elif causal:
            part = default_positions(length, first, query.device)
        found.append(part if causal else None)
    return found[0], found[1]
