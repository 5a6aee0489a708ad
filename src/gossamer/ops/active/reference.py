"""The plain reference of the products over active neurons."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def to_float(values: Tensor, scale: Tensor | None) -> Tensor:
    """The stored neurons (neurons, width) as float32."""
    return values.float() if scale is None else values.float() * scale


def above(x: Tensor, threshold: float) -> Tensor:
    """int32 indices, ascending, of |x| > threshold; NaN counts as above."""
    return torch.nonzero(~(x.float().abs() <= threshold)).reshape(-1).to(torch.int32)


def largest(x: Tensor, k: int) -> Tensor:
    """int32 indices, ascending, of the k largest |x|; ties keep the lower index, NaN is largest."""
    size = torch.nan_to_num(x.float().abs(), nan=torch.inf, posinf=torch.inf)
    size = size.double().masked_fill(torch.isinf(size), torch.finfo(torch.float64).max)
    size[torch.isnan(x)] = torch.inf
    order = torch.sort(size, descending=True, stable=True).indices
    return order[:k].sort().values.to(torch.int32)


def linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    threshold: float,
) -> Tensor:
    """Row by row of x: the sum of the active neurons times their inputs, plus bias."""
    results = []
    for row in x.reshape(math.prod(x.shape[:-1]), values.shape[0]).float():
        active = (above(row, threshold) if index is None else index).long()
        results.append(row[active] @ to_float(values, scale)[active])
    y = torch.stack(results) if results else torch.empty(0, values.shape[1])
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], values.shape[1])


def gated_mlp(
    x: Tensor,
    gate: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    threshold: float,
    top: int,
    by_gate: bool,
) -> Tensor:
    """Down of the kept neurons of silu(gate x) * (up x), row by row of x."""
    gate_rows, up_rows, down_rows = to_float(*gate), to_float(*up), to_float(*down)
    results = []
    for row in x.reshape(math.prod(x.shape[:-1]), gate_rows.shape[1]).float():
        score = functional.silu(gate_rows @ row)
        hidden = score * (up_rows @ row)
        score = score if by_gate else hidden
        active = (above(score, threshold) if top < 0 else largest(score, top)).long()
        results.append(hidden[active] @ down_rows[active])
    y = torch.stack(results) if results else torch.empty(0, down_rows.shape[1])
    return y.to(x.dtype).reshape(*x.shape[:-1], down_rows.shape[1])
