"""Attention of a few queries over listed keys or pages of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.attention import native, reference
from gossamer.ops.attention.checks import check_inputs, check_key_bias, compiled, paired_positions
from gossamer.ops.attention.merging import State
from gossamer.ops.attention.problem import Problem


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    page: int = 1,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> State:
    """Attention of few queries, for decoding: (output, lse); only listed keys are read.

    One list serves all query heads that share a head of keys. The work is split over keys as well
    as heads, and no layout has to be made. Not differentiable.

    Parameters
    ----------
    query, key, value : Tensor
        As in `attention`. Keys and values may be slices of a longer cache.
    index : Tensor
        int64 (batch, kv_heads, count): keys, or pages of `page` keys each, in any order, none
        twice. -1 stands for none, where heads have lists of different lengths.
    page : int
        Keys of a page; the last one may be ragged.
    causal, scale, key_bias, query_positions, key_positions
        As in `attention`.
    """
    scale = check_inputs(query, key, value, scale)
    batch, kv_heads, keys = key.shape[:3]
    if index.dtype not in (torch.int32, torch.int64) or tuple(index.shape[:-1]) != (
        batch,
        kv_heads,
    ):
        raise UsageError(
            f"an index is int64 ({batch}, {kv_heads}, count), not {index.dtype} "
            f"{tuple(index.shape)}"
        )
    if page < 1:
        raise UsageError(f"a page holds at least 1 key, not {page}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UsageError("decode has no gradients: use torch.no_grad(), or attention")
    check_key_bias(key_bias, query, keys)
    positions = paired_positions(query, keys, causal, query_positions, key_positions)
    if compiled(query) and _dispatch.direct():
        bias = None if key_bias is None else key_bias.float()
        try:
            return native.decode(query, key, value, index, page, bias, *positions, causal, scale)
        except ValueError as error:
            raise UsageError(str(error)) from error
    offsets, tokens = _lists(index, page, keys)
    shape = (*offsets.shape[:2], 2)
    problem = Problem(
        torch.zeros(shape, dtype=torch.int64, device=key.device), tokens[:0], None, None, offsets,
        tokens, None, key_bias, *positions, max(1, query.shape[2]), 64, max(1, query.shape[2]),
        causal, scale,
    )  # fmt: skip
    return reference.forward(query, key, value, problem)


def _lists(index: Tensor, page: int, keys: int) -> tuple[Tensor, Tensor]:
    """Offsets (batch, kv heads, 2) and keys (n,), ascending, of lists of pages."""
    pages = -(-keys // page)
    outside = (index < -1) | (index >= pages)
    if bool(outside.any()):
        found = int(index[outside][0])
        raise UsageError(f"index {found} is none of 0 to {pages - 1}, nor -1 for no page")
    ordered = index.sort(dim=-1).values
    twice = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        found = int(ordered[..., 1:][twice][0])
        raise UsageError(f"index {found} occurs twice for one head of keys")
    tokens = ordered.unsqueeze(-1) * page + torch.arange(page, device=index.device)
    kept = ((ordered >= 0).unsqueeze(-1) & (tokens < keys)).flatten(-2)
    ends = kept.sum(-1).flatten().cumsum(0).reshape(index.shape[:2])
    offsets = torch.stack([ends - kept.sum(-1), ends], dim=-1)
    return offsets, tokens.flatten(-2)[kept].to(torch.int32)
