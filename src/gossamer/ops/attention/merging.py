"""Exact merging of attention over disjoint keys."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import UsageError

State = tuple[Tensor, Tensor]
"""(output, lse): (batch, heads, queries, width) and the log-sum-exp (batch, heads, queries)."""


def merge(first: State, second: State) -> State:
    """The attention over two disjoint sets of keys, from that over each; exact and differentiable.

    L = logaddexp(L1, L2) and O = exp(L1 - L) O1 + exp(L2 - L) O2. Where lse is -inf the set was
    empty, has weight 0, and its output is not read. The output has the dtype of `first`.
    """
    check_state("first", first, tuple(second[0].shape))
    check_state("second", second, tuple(first[0].shape))
    (one, one_lse), (two, two_lse) = first, second
    highest = torch.maximum(one_lse, two_lse).detach()
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    weights = [torch.exp(lse - highest) for lse in (one_lse, two_lse)]
    total = weights[0] + weights[1]
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    parts = []
    for part, weight in zip((one, two), weights, strict=True):
        share = (weight / total).unsqueeze(-1)
        parts.append(share * torch.where(share == 0, 0.0, part.to(share.dtype)))
    lse = torch.where(empty, -torch.inf, highest + total.log())
    return (parts[0] + parts[1]).to(one.dtype), lse


def check_state(name: str, state: State, shape: tuple[int, ...]) -> None:
    """Raise UsageError unless (output, lse) have the shape of an output."""
    output, lse = state
    if tuple(output.shape) != shape or tuple(lse.shape) != shape[:-1]:
        raise UsageError(
            f"{name} is an (output, lse) pair of shapes {shape} and {shape[:-1]}, not "
            f"{tuple(output.shape)} and {tuple(lse.shape)}"
        )
    if lse.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"the lse of {name} is float32, not {lse.dtype}")
