"""The compiled home of the products with compressed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels

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
    batch = y.numel() // max(1, out)
    bias = None if bias is None else bias.contiguous()
    xt, yt = _scratch(in_features), _scratch(out)
    reordered = None if places is None else torch.empty_like(values)
    _module().csr_linear(
        values.data_ptr(),
        0 if places is None else places.data_ptr(),
        0 if reordered is None else reordered.data_ptr(),
        columns.data_ptr(),
        splits.data_ptr(),
        out,
        in_features,
        x.data_ptr(),
        y.data_ptr(),
        batch,
        0 if bias is None else bias.data_ptr(),
        xt.data_ptr(),
        yt.data_ptr(),
        _threads(columns.numel() * batch),
        isa_index(),
    )
    return y


def sampled(x: Tensor, dy: Tensor, columns: Tensor, splits: Tensor) -> Tensor:
    """(nnz,): the gradient of the kept values, float32."""
    x, dy = x.contiguous(), dy.contiguous()
    out, in_features = splits.shape[1], x.shape[-1]
    batch = x.numel() // max(1, in_features)
    grad = x.new_empty(columns.numel()) if batch else x.new_zeros(columns.numel())
    xt, yt = _scratch(in_features), _scratch(out)
    _module().csr_sampled(
        columns.data_ptr(),
        splits.data_ptr(),
        out,
        in_features,
        x.data_ptr(),
        dy.data_ptr(),
        grad.data_ptr(),
        batch,
        xt.data_ptr(),
        yt.data_ptr(),
        _threads(columns.numel() * batch),
        isa_index(),
    )
    return grad


def _scratch(features: int) -> Tensor:
    return torch.empty(max(1, features) * int(_module().CSR_WIDTH))


def _threads(work: int) -> int:
    return 1 if work < _SMALL else torch.get_num_threads()


def _module() -> Any:
    module = kernels()
    assert module is not None
    return module
