"""The compiled home of the depthwise convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels

_SMALL = 1 << 15
"""Below so many outputs a second thread costs more than it gains."""


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """x, weight and bias contiguous float32."""
    module: Any = kernels()
    assert module is not None
    images, channels, height, width = x.shape
    y = torch.empty(images, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    module.depthwise_conv(
        x.data_ptr(),
        images,
        channels,
        height,
        width,
        stride,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        1 if y.numel() < _SMALL else torch.get_num_threads(),
        isa_index(),
    )
    return y
