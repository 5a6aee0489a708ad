"""The compiled backend of the products over active neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops._dispatch import compiled, isa_index

_SMALL = 1 << 16
"""Below so many stored weights a second thread costs more than it gains."""


def above(x: Tensor, threshold: float) -> Tensor:
    """int32 indices, ascending, of |x| > threshold; NaN counts as above."""
    x = x.float().contiguous()
    index = torch.empty(x.numel() + 1, dtype=torch.int32)
    count = compiled().active_above(x, threshold, index, isa_index())
    return index[:count].clone()


def largest(x: Tensor, k: int) -> Tensor:
    """int32 indices, ascending, of the k largest |x|; ties keep the lower index, NaN is largest."""
    x = x.float().contiguous()
    index = torch.empty(k, dtype=torch.int32)
    compiled().active_largest(x, index)
    return index


def linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    threshold: float,
) -> Tensor:
    """Sums in float32, in an order that does not depend on the number of threads."""
    inputs = x.float().contiguous()
    y = torch.empty(*x.shape[:-1], values.shape[1])
    bias = None if bias is None else bias.float().contiguous()
    index = None if index is None else index.to(torch.int32).contiguous()
    threads = _threads(values)
    if y.numel():
        compiled().active_sum(
            values, scale, inputs, index, threshold, y, bias, threads, isa_index()
        )
    return y.to(x.dtype)


def gated_mlp(
    x: Tensor,
    gate: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    threshold: float,
    top: int,
    by_gate: bool,
) -> Tensor:
    """One call does it all: products, activation, choice and the sum over the kept neurons."""
    inputs = x.float().contiguous()
    y = torch.empty(*x.shape[:-1], down[0].shape[1])
    choice = (threshold, top, by_gate)
    weights, threads = (*gate, *up, *down), _threads(gate[0])
    if y.numel():
        compiled().active_mlp(*weights, *choice, inputs, y, threads, isa_index())
    return y.to(x.dtype)


def _threads(values: Tensor) -> int:
    return 1 if values.numel() < _SMALL else torch.get_num_threads()
