"""The plain reference: one block of queries after another, against all keys, masked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.ops.attention import bits
from gossamer.ops.attention.problem import Problem

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """(output, lse); sums in float32, or in float64 for that. Memory O(block of queries * keys)."""
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=_sums(query))
    k, v = key.to(lse.dtype), value.to(lse.dtype)
    for block, part in _blocks(query, problem):
        mask, bias = _mask(problem, block, query, k)
        logits = _logits(query[:, :, part].to(lse.dtype), k, mask, bias, problem)
        highest = logits.amax(-1, keepdim=True) if k.shape[2] else logits.new_zeros(())
        highest = torch.where(highest == -torch.inf, 0.0, highest)
        weights = torch.exp(logits - highest)
        total = weights.sum(-1, keepdim=True)
        whole = torch.where(total == 0, 1.0, total)
        found = _apply(weights / whole, _read(v, mask))
        output[:, :, part] = found.to(output.dtype)
        lse[:, :, part] = (torch.log(total) + highest).squeeze(-1)
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
    """Gradients of query, key, value, block_bias and key_bias; None for a bias that is None.

    P = exp(S - L) and dS = P * (dO V^T - rowsum(dO * O) + dL).
    """
    sums = lse.dtype
    k, v = key.to(sums), value.to(sums)
    grad_query = torch.zeros_like(query)
    grad_key, grad_value = torch.zeros_like(k), torch.zeros_like(v)
    block_bias, key_bias = problem.block_bias, problem.key_bias
    grad_block = None if block_bias is None else torch.zeros_like(block_bias)
    grad_bias = None if key_bias is None else torch.zeros_like(key_bias)
    for block, part in _blocks(query, problem):
        mask, bias = _mask(problem, block, query, k)
        alive = mask.any(-1, keepdim=True)  # what an empty row holds does not matter
        q, d_out = (torch.where(alive, x[:, :, part].to(sums), 0.0) for x in (query, grad))
        logits = _logits(q, k, mask, bias, problem)
        total = lse[:, :, part].unsqueeze(-1)
        weights = torch.where(mask, torch.exp(logits - total), 0.0)
        inner = (d_out * output[:, :, part].to(sums)).sum(-1, keepdim=True)
        read = _read(v, mask)
        shift = grad_lse[:, :, part].unsqueeze(-1) - inner
        d_logits = weights * (_scores(d_out, read) + shift)
        d_logits = torch.where(mask, d_logits, 0.0)
        grad_query[:, :, part] = (_apply(d_logits, _read(k, mask)) * problem.scale).to(query.dtype)
        grad_key += _gather(d_logits, q, key.shape[1]) * problem.scale
        grad_value += _gather(weights, d_out, key.shape[1])
        if grad_bias is not None:
            _add_shared(grad_bias, d_logits.sum(2))
        if grad_block is not None:
            _add_blocks(grad_block, d_logits, problem, block)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_block, grad_bias


def _sums(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _blocks(query: Tensor, problem: Problem) -> Iterator[tuple[int, slice]]:
    for block, first in enumerate(range(0, query.shape[2], problem.rows)):
        yield block, slice(first, min(first + problem.rows, query.shape[2]))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, ...) as (batch, kv heads, heads of each, ...)."""
    return x.unflatten(1, (kv_heads, -1))


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, queries, keys): products, keys not repeated."""
    return (_grouped(query, key.shape[1]) @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)


def _apply(weights: Tensor, value: Tensor) -> Tensor:
    return (_grouped(weights, value.shape[1]) @ value.unsqueeze(2)).flatten(1, 2)


def _gather(weights: Tensor, query: Tensor, kv_heads: int) -> Tensor:
    """(batch, kv heads, keys, width): weights^T query, summed over the heads of a group."""
    return (_grouped(weights, kv_heads).transpose(-1, -2) @ _grouped(query, kv_heads)).sum(2)


def _read(x: Tensor, mask: Tensor) -> Tensor:
    """Keys or values with 0 for those that no query here attends, whatever memory held there."""
    read = _grouped(mask.any(2).expand(x.shape[0], -1, -1), x.shape[1]).any(2)
    return torch.where(read.unsqueeze(-1), x, 0.0)


def _logits(
    query: Tensor, key: Tensor, mask: Tensor, bias: Tensor | None, problem: Problem
) -> Tensor:
    logits = _scores(query, key) * problem.scale
    if bias is not None:
        logits = logits + bias
    return torch.where(mask, logits, -torch.inf)


def _spread(x: Tensor, batch: int, heads: int) -> Tensor:
    """(batch, heads, ...) from what batches and neighbouring heads share."""
    repeated = x.repeat_interleave(heads // x.shape[1], dim=1)
    return repeated.expand(batch, *repeated.shape[1:])


def _add_shared(total: Tensor, part: Tensor) -> None:
    """total += part (batch, heads, ...), summed over the batches and heads that share."""
    summed = part.unflatten(1, (total.shape[1], -1)).sum(2)
    total += summed if total.shape[0] > 1 else summed.sum(0, keepdim=True)


def _mask(problem: Problem, block: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of one block of queries: bool (batch, heads, queries, keys), and biases that fit it."""
    batch, heads, queries = query.shape[:3]
    first, keys = block * problem.rows, key.shape[2]
    last = min(first + problem.rows, queries)
    mask, bias = _tiles(problem, block, keys, key)
    mask = mask[:, :, : last - first]
    if problem.token_offsets is not None:
        mask = mask | _tokens(problem, first, last, keys, key)
    mask = _spread(mask, batch, heads)
    bias = None if bias is None else _spread(bias, batch, heads)
    if problem.key_bias is not None:
        shared = _spread(problem.key_bias.to(key.dtype), batch, heads).unsqueeze(2)
        mask = mask & (shared != -torch.inf)
        bias = shared if bias is None else bias + shared
    if problem.causal:
        assert problem.query_positions is not None and problem.key_positions is not None
        now = _spread(problem.query_positions[:, :, first:last], batch, heads)
        then = _spread(problem.key_positions, batch, heads)
        mask = mask & (now.unsqueeze(-1) >= then.unsqueeze(-2))
    return mask, bias


def _tiles(problem: Problem, block: int, keys: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tiles of one block of queries: bool (.., rows, keys), and their biases (.., 1, keys)."""
    lead, columns = problem.offsets.shape[:2], problem.columns
    blocks = -(-keys // columns)
    mask = like.new_zeros(*lead, problem.rows, blocks, columns, dtype=torch.bool)
    bias = like.new_zeros(*lead, 1, blocks, columns)
    for b, h, entries in _lists(problem.offsets, block):
        listed = problem.blocks[entries].long()
        mask[b, h, :, listed] = True
        if problem.tiles is not None and problem.masks is not None:
            tiles = problem.tiles[entries].long()
            some = tiles >= 0
            masks = bits.unpack(problem.masks[tiles[some]], columns)
            mask[b, h, :, listed[some]] = masks.transpose(0, 1)
        if problem.block_bias is not None:
            bias[b, h, 0, listed] = problem.block_bias[entries].to(bias.dtype).unsqueeze(-1)
    masks, biases = mask.flatten(-2)[..., :keys], bias.flatten(-2)[..., :keys]
    return masks, None if problem.block_bias is None else biases


def _tokens(problem: Problem, first: int, last: int, keys: int, like: Tensor) -> Tensor:
    """The token index of queries first..last: bool (.., queries, keys)."""
    assert problem.token_offsets is not None and problem.tokens is not None
    lead = problem.token_offsets.shape[:2]
    mask = like.new_zeros(*lead, last - first, keys, dtype=torch.bool)
    for group in range(first // problem.group, -(-last // problem.group)):
        start = max(0, group * problem.group - first)
        rows = slice(start, (group + 1) * problem.group - first)
        for b, h, entries in _lists(problem.token_offsets, group):
            mask[b, h, rows, problem.tokens[entries].long()] = True
    return mask


def _lists(offsets: Tensor, row: int) -> Iterator[tuple[int, int, slice]]:
    for b, heads in enumerate(offsets[:, :, row : row + 2].tolist()):
        for h, (begin, end) in enumerate(heads):
            yield b, h, slice(begin, end)


def _add_blocks(total: Tensor, d_logits: Tensor, problem: Problem, block: int) -> None:
    """The gradient of each entry's bias: the sum over its tile, and over who shares it."""
    keys, columns = d_logits.shape[-1], problem.columns
    inside, _ = _tiles(problem, block, keys, d_logits)
    inside = _spread(inside[:, :, : d_logits.shape[2]], *d_logits.shape[:2])
    summed = torch.where(inside, d_logits, 0.0).sum(2)
    summed = torch.nn.functional.pad(summed, (0, -keys % columns)).unflatten(-1, (-1, columns))
    shared = d_logits.new_zeros(*problem.offsets.shape[:2], summed.shape[2])
    _add_shared(shared, summed.sum(-1))
    for b, h, entries in _lists(problem.offsets, block):
        total[entries] += shared[b, h, problem.blocks[entries].long()].to(total.dtype)
