"""The compiled backend of attention over chosen pairs; see csrc/attention/attention.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import compiled, isa_index
from gossamer.ops.attention.problem import Problem
from gossamer.ops.attention.reference import Grads

_SMALL = 1 << 17
"""Below so many multiplications a second thread costs more than it gains."""


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """(output, lse) of float32 or bfloat16; sums in float32."""
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if output.numel():
        threads = _threads(query, problem)
        _task(query, key, value, problem).forward(output, lse, threads, isa_index())
    return output, lse


def backward(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    problem: Problem,
) -> Grads:
    """Gradients of query, key, value, block_bias and key_bias; None for a bias that is None."""
    shared = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
              for x in (problem.block_bias, problem.key_bias)]  # fmt: skip
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    if output.numel():
        task, threads = _task(query, key, value, problem), _threads(query, problem)
        given = (_rows(grad), grad_lse.contiguous(), output, lse)
        task.backward(*given, *grads, *shared, threads, isa_index())
    else:
        for x in grads:
            x.zero_()
    return grads[0], grads[1], grads[2], shared[0], shared[1]


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    page: int,
    key_bias: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(output, lse); raises ValueError for an index out of range or one that occurs twice."""
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if output.numel():
        work = index.numel() * page * query.shape[3] * query.shape[2]
        threads = 1 if work < _SMALL else torch.get_num_threads()
        inputs = (_rows(query), _rows(key), _rows(value), index.to(torch.int64).contiguous())
        extras = (_contiguous(key_bias), query_positions, key_positions)
        compiled().attention_decode(
            *inputs, page, *extras, causal, scale, output, lse, threads, isa_index()
        )
    return output, lse


def _task(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Any:
    p = problem
    lists = [
        None if part is None else part.to(torch.int32).contiguous()
        for part in (p.blocks, p.tiles, p.tokens)
    ]
    inputs = (_rows(query), _rows(key), _rows(value), p.offsets.contiguous())
    rest = (lists[0], lists[1], _contiguous(p.masks), _contiguous(p.token_offsets), lists[2])
    biases = (_contiguous(p.block_bias), _contiguous(p.key_bias))
    sizes = (p.rows, p.columns, p.group, p.causal, p.scale)
    return compiled().Attention(*inputs, *rest, *biases, p.query_positions, p.key_positions, *sizes)


def _rows(x: Tensor) -> Tensor:
    """With its last axis contiguous; the others may lie apart, as in a slice of a cache."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _threads(query: Tensor, problem: Problem) -> int:
    """One where there is little to do."""
    pairs = problem.blocks.numel() * problem.rows * problem.columns
    if problem.tokens is not None:
        pairs += problem.tokens.numel() * problem.group
    batch, heads, _, width = query.shape
    shared = problem.offsets.shape[0] * problem.offsets.shape[1]
    work = pairs * width * max(1, batch * heads // shared)
    return 1 if work < _SMALL else torch.get_num_threads()
