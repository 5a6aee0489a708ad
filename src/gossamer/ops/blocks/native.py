"""The compiled backend of the product with blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops._dispatch import compiled, isa_index

_SMALL = 1 << 15
"""Below so many multiplications a second thread costs more than it gains."""


def linear(
    x: Tensor, values: Tensor, columns: Tensor, splits: Tensor, bias: Tensor | None
) -> Tensor:
    """One call: turning x, product, bias and turning back."""
    inputs = x.float().contiguous()
    out, in_features = splits.shape[1] * values.shape[2], x.shape[-1]
    y = inputs.new_empty(*x.shape[:-1], out)
    if not y.numel():
        return y.to(x.dtype)
    batch = y.numel() // out
    bias = None if bias is None else bias.detach().float().contiguous()
    xt, yt = torch.empty(max(1, in_features) * 128), torch.empty(max(1, out) * 128)
    threads = 1 if values.numel() * batch < _SMALL else torch.get_num_threads()
    matrix = (values, columns, splits)
    compiled().blocks_linear(*matrix, inputs, y, bias, in_features, xt, yt, threads, isa_index())
    return y.to(x.dtype)
