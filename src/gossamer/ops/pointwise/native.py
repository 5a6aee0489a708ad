"""The compiled home of the sparse 1x1 convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels
from gossamer.ops.pointwise.reference import Parts

_SMALL = 1 << 15
"""Below so many multiplications a second thread costs more than it gains."""


def conv(
    x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None, low: float, high: float
) -> Tensor:
    """x (images, in, pixels), float32 and contiguous."""
    module: Any = kernels()
    assert module is not None
    values, columns, rows, row_ptr = parts
    images, _, pixels = x.shape
    y = torch.empty(images, shape[0], pixels)
    if y.numel():
        module.pointwise_conv(
            values.data_ptr(),
            columns.data_ptr(),
            rows.data_ptr(),
            row_ptr.data_ptr(),
            *shape,
            x.data_ptr(),
            y.data_ptr(),
            images,
            pixels,
            0 if bias is None else bias.data_ptr(),
            low,
            high,
            1 if values.numel() * images * pixels < _SMALL else torch.get_num_threads(),
            isa_index(),
        )
    return y
