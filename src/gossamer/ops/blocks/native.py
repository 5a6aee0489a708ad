"""The compiled home of the product with blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels

_SMALL = 1 << 15
"""Below so many multiplications a second thread costs more than it gains."""


def linear(
    x: Tensor, values: Tensor, columns: Tensor, splits: Tensor, bias: Tensor | None
) -> Tensor:
    """One call: turning x, product, bias and turning back."""
    width, height = values.shape[1:]
    inputs = x.float().contiguous()
    out, in_features = splits.shape[1] * height, x.shape[-1]
    y = inputs.new_empty(*x.shape[:-1], out)
    batch = y.numel() // max(1, out)
    bias = None if bias is None else bias.detach().float().contiguous()
    xt, yt = torch.empty(max(1, in_features) * 128), torch.empty(max(1, out) * 128)
    _module().blocks_linear(
        values.data_ptr(),
        columns.data_ptr(),
        splits.data_ptr(),
        out,
        in_features,
        height,
        width,
        values.dtype == torch.bfloat16,
        inputs.data_ptr(),
        y.data_ptr(),
        batch,
        0 if bias is None else bias.data_ptr(),
        xt.data_ptr(),
        yt.data_ptr(),
        1 if values.numel() * batch < _SMALL else torch.get_num_threads(),
        isa_index(),
    )
    return y.to(x.dtype)


def _module() -> Any:
    module = kernels()
    assert module is not None
    return module
