"""The compiled home of the products over active lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_SMALL = 1 << 16
"""Below so many stored weights a second thread costs more than it gains."""


def above(x: Tensor, threshold: float) -> Tensor:
    """int32 indices, ascending, of |x| > threshold; NaN counts as above."""
    x = x.float().contiguous()
    index = torch.empty(x.numel() + 1, dtype=torch.int32)
    count = _module().active_above(
        x.data_ptr(), x.numel(), threshold, index.data_ptr(), isa_index()
    )
    return index[:count].clone()


def largest(x: Tensor, k: int) -> Tensor:
    """int32 indices, ascending, of the k largest |x|; ties keep the lower index, NaN is largest."""
    x = x.float().contiguous()
    index = torch.empty(k, dtype=torch.int32)
    _module().active_largest(x.data_ptr(), x.numel(), k, index.data_ptr())
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
    given = index is not None and index.numel() > 0
    if index is not None and not given:  # address 0 would mean: above the threshold
        index = torch.zeros(1, dtype=torch.int32)
    _module().active_sum(
        _parts(values, scale),
        inputs.data_ptr(),
        y.numel() // max(1, values.shape[1]),
        0 if index is None else index.data_ptr(),
        index.numel() if index is not None and given else 0,
        threshold,
        y.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        _threads(values),
        isa_index(),
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
    _module().active_mlp(
        _parts(*gate),
        _parts(*up),
        _parts(*down),
        threshold,
        top,
        by_gate,
        inputs.data_ptr(),
        y.numel() // max(1, down[0].shape[1]),
        y.data_ptr(),
        _threads(gate[0]),
        isa_index(),
    )
    return y.to(x.dtype)


def _parts(values: Tensor, scale: Tensor | None) -> tuple[int, ...]:
    per_line = scale is not None and scale.shape[1] == 1
    address = 0 if scale is None else scale.data_ptr()
    lines, width = values.shape
    kind = _TYPES[values.dtype]
    return (
        values.data_ptr(),
        address if per_line else 0,
        0 if per_line else address,
        lines,
        width,
        kind,
    )


def _threads(values: Tensor) -> int:
    return 1 if values.numel() < _SMALL else torch.get_num_threads()


def _module() -> Any:
    module = kernels()
    assert module is not None
    return module
