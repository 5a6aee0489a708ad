"""The compiled backend of the products with compressed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops._dispatch import compiled, isa_index

_SMALL = 1 << 15
"""Below so many multiplications a second thread costs more than it gains."""


def linear(
    x: Tensor,
    values: Tensor,
    places: Tensor | None,
    columns: Tensor,
    splits: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """One call: turning x, product, bias and turning back; float32. Entry e of the matrix is
    values[places[e]], or values[e] without `places`."""
    x, values = x.contiguous(), values.contiguous()
    out, in_features = splits.shape[1], x.shape[-1]
    y = x.new_empty(*x.shape[:-1], out)
    if not y.numel():
        return y
    batch = y.numel() // out
    bias = None if bias is None else bias.contiguous()
    xt, yt = _scratch(in_features), _scratch(out)
    reordered = None if places is None else torch.empty_like(values)
    matrix, threads = (
        (values, places, reordered, columns, splits),
        _threads(columns.numel() * batch),
    )
    compiled().csr_linear(*matrix, x, y, bias, in_features, xt, yt, threads, isa_index())
    return y


def sampled(x: Tensor, dy: Tensor, columns: Tensor, splits: Tensor) -> Tensor:
    """(nnz,): the gradient of the kept values, float32."""
    x, dy = x.contiguous(), dy.contiguous()
    out, in_features = splits.shape[1], x.shape[-1]
    batch = x.numel() // max(1, in_features)
    if not batch or not columns.numel():
        return x.new_zeros(columns.numel())
    grad = x.new_empty(columns.numel())
    xt, yt = _scratch(in_features), _scratch(out)
    arrays, threads = (columns, splits, x, dy, grad), _threads(columns.numel() * batch)
    compiled().csr_sampled(*arrays, batch, in_features, xt, yt, threads, isa_index())
    return grad


def _scratch(features: int) -> Tensor:
    return torch.empty(max(1, features) * int(compiled().CSR_WIDTH))


def _threads(work: int) -> int:
    return 1 if work < _SMALL else torch.get_num_threads()
