"""Attention that computes chosen pairs of queries and keys only: one executor for every chooser.

A `Layout` says which pairs: lists of key blocks per block of queries, masks within tiles, single
keys per group of queries. Computation is that of FlashAttention (one online softmax per query over
the listed tiles), so nothing of size queries * keys exists. The log-sum-exp comes back with the
output, and `merge` joins results over disjoint keys exactly. `decode` is for a few queries.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gossamer.ops import _dispatch
from gossamer.ops.attention import native, reference
from gossamer.ops.attention.checks import (
    check_inputs,
    check_key_bias,
    check_layout,
    compiled,
    paired_positions,
)
from gossamer.ops.attention.decoding import decode
from gossamer.ops.attention.layout import Layout
from gossamer.ops.attention.merging import State, check_state, merge
from gossamer.ops.attention.problem import Problem
from gossamer.ops.attention.room import room

__all__ = ["Layout", "State", "attention", "decode", "kernel_name", "merge", "room"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    causal: bool = False,
    scale: float | None = None,
    block_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    start: State | None = None,
) -> State:
    """Softmax attention over the pairs of a layout: (output, lse).

    Differentiable in query, key, value, both biases and `start`. A query without keys gets output
    0 and lse -inf. Keys that no query of a block attends are not read, or do not matter.

    Parameters
    ----------
    query : Tensor
        (batch, heads, queries, width), float32 or bfloat16; sums are float32. Other floating
        dtypes, and devices other than the CPU, are served by the reference.
    key, value : Tensor
        (batch, kv_heads, keys, width) and (.., value width), not repeated: neighbouring query
        heads share one of theirs.
    layout : Layout
        Which pairs are computed.
    causal : bool
        Compute only pairs whose query's position is at least the key's.
    scale : float or None
        Factor of the products; 1 / sqrt(width) where None.
    block_bias : Tensor or None
        (entries,), added to the logits of each listed tile, such as ln(n) where a key stands for n.
    key_bias : Tensor or None
        (batch or 1, heads or a divisor, keys), added to the logits; -inf leaves a key out.
    query_positions, key_positions : Tensor or None
        int64 (length,) or (batch or 1, heads or a divisor, length): places in the original order.
        Keys are 0, 1, ... where None, and the queries the last of them.
    start : (Tensor, Tensor) or None
        (output, lse) over other keys, from which the softmax goes on.

    Returns
    -------
    tuple of Tensor
        output (batch, heads, queries, value width) of the query's dtype; lse (batch, heads,
        queries), float32.
    """
    scale = check_inputs(query, key, value, scale)
    check_layout(layout, query, key.shape[2], block_bias)
    check_key_bias(key_bias, query, key.shape[2])
    pair = paired_positions(query, key.shape[2], causal, query_positions, key_positions)
    if start is not None:
        check_state("start", start, (*query.shape[:3], value.shape[-1]))
    problem = _problem(layout, query, block_bias, key_bias, pair, causal, scale)
    if _dispatch.direct(query, key, value, block_bias, key_bias):
        found = _forward(query, key, value, problem)
    else:
        found = _attention(query, key, value, *_plain(problem))
    return found if start is None else merge(found, start)


def kernel_name(query: Tensor | None = None) -> str:
    """The kernel that serves such a query, such as `attention/avx512`.

    `-bf16` behind it says that products are the processor's dot products of bfloat16.
    """
    isa = _dispatch.isa() if query is None or compiled(query) else "reference"
    dots = query is not None and query.dtype == torch.bfloat16 and isa == "avx512"
    return f"attention/{isa}{'-bf16' if dots and _dispatch.compiled().has_bf16() else ''}"


def _problem(
    layout: Layout,
    query: Tensor,
    block_bias: Tensor | None,
    key_bias: Tensor | None,
    positions: tuple[Tensor | None, Tensor | None],
    causal: bool,
    scale: float,
) -> Problem:
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    block, key = (None if part is None else part.to(sums) for part in (block_bias, key_bias))
    l = layout  # noqa: E741
    return Problem(
        l.offsets, l.blocks, l.tiles, l.masks, l.token_offsets, l.tokens, block, key,
        positions[0], positions[1], l.rows, l.columns, l.group, causal, scale,
    )  # fmt: skip


def _plain(problem: Problem) -> tuple[Any, ...]:
    return tuple(getattr(problem, field.name) for field in fields(problem))


def _forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> State:
    backend = native if compiled(query) else reference
    return backend.forward(query, key, value, problem)


@torch.library.custom_op("gossamer::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    blocks: Tensor,
    tiles: Tensor | None,
    masks: Tensor | None,
    token_offsets: Tensor | None,
    tokens: Tensor | None,
    block_bias: Tensor | None,
    key_bias: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    rows: int,
    columns: int,
    group: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    problem = Problem(
        offsets, blocks, tiles, masks, token_offsets, tokens, block_bias, key_bias,
        query_positions, key_positions, rows, columns, group, causal, scale,
    )  # fmt: skip
    return _forward(query, key, value, problem)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    return output, query.new_empty(query.shape[:3], dtype=sums)


@torch.library.custom_op("gossamer::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    offsets: Tensor,
    blocks: Tensor,
    tiles: Tensor | None,
    masks: Tensor | None,
    token_offsets: Tensor | None,
    tokens: Tensor | None,
    block_bias: Tensor | None,
    key_bias: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    rows: int,
    columns: int,
    group: int,
    causal: bool,
    scale: float,
) -> list[Tensor]:
    problem = Problem(
        offsets, blocks, tiles, masks, token_offsets, tokens, block_bias, key_bias,
        query_positions, key_positions, rows, columns, group, causal, scale,
    )  # fmt: skip
    backend = native if compiled(query) else reference
    found = backend.backward(grad, grad_lse, query, key, value, output, lse, problem)
    return [part for part in found if part is not None]


@_attention_backward.register_fake
def _(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    offsets: Tensor,
    blocks: Tensor,
    tiles: Tensor | None,
    masks: Tensor | None,
    token_offsets: Tensor | None,
    tokens: Tensor | None,
    block_bias: Tensor | None,
    key_bias: Tensor | None,
    *rest: object,
) -> list[Tensor]:
    parts = (query, key, value, block_bias, key_bias)
    return [part.new_empty(part.shape) for part in parts if part is not None]


def _setup(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rest = inputs
    tensors, plain = rest[:10], rest[10:]
    ctx.save_for_backward(query, key, value, *output, *tensors)  # type: ignore[attr-defined]
    ctx.plain = plain  # type: ignore[attr-defined]
    ctx.set_materialize_grads(True)  # type: ignore[attr-defined]


def _backward(ctx: object, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, output, lse, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    plain = ctx.plain  # type: ignore[attr-defined]
    gradients = (grad.contiguous(), grad_lse.contiguous())
    given = (query, key, value, output, lse, *tensors, *plain)
    found = iter(_attention_backward(*gradients, *given))
    grads = [next(found), next(found), next(found)]
    biases = [None if part is None else next(found) for part in tensors[6:8]]
    return (*grads, *([None] * 6), *biases, *([None] * 7))


_attention.register_autograd(_backward, setup_context=_setup)
