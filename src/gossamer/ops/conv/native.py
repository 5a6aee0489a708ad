"""The compiled home of the convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.ops._dispatch import isa_index, kernels
from gossamer.ops.conv.reference import Before, Ends, Form, Window

_SMALL = 1 << 16
"""Below so many multiplications a second thread costs more than it gains."""


def conv(x: Tensor, form: Form, window: Window, ends: Ends, before: Before | None) -> Tensor:
    """x, biases and the weight before contiguous."""
    module: Any = kernels()
    assert module is not None
    images, channels, height, width = x.shape
    if before is not None:
        window = Window((3, 3), (before.stride, before.stride), (1, 1))
    high, wide = window.outputs(height, width)
    y = torch.empty(images, form.shape[0], high, wide)
    if y.numel() == 0:
        return y
    first = (0, 0) if before is None else (_address(before.weight), _address(before.ends.bias))
    clamp = (0.0, 0.0) if before is None else (before.ends.low, before.ends.high)
    module.sparse_conv(
        (images, channels, height, width, *window.kernel, *window.stride, *window.padding),
        (
            form.values.data_ptr(),
            form.columns.data_ptr(),
            form.counts.data_ptr(),
            form.rows.data_ptr(),
            *form.shape,
            form.tiled,
        ),
        (*first, _address(ends.bias)),
        (*clamp, ends.low, ends.high),
        x.data_ptr(),
        y.data_ptr(),
        _threads(form.values.numel() * images * high * wide),
        isa_index(),
    )
    return y


def depthwise(x: Tensor, before: Before) -> Tensor:
    """x, weight and bias contiguous."""
    module: Any = kernels()
    assert module is not None
    stride, ends = before.stride, before.ends
    high, wide = Window((3, 3), (stride, stride), (1, 1)).outputs(x.shape[2], x.shape[3])
    y = torch.empty(x.shape[0], x.shape[1], high, wide)
    if y.numel():
        module.depthwise_conv(
            (*x.shape, 3, 3, stride, stride, 1, 1),
            before.weight.data_ptr(),
            _address(ends.bias),
            ends.low,
            ends.high,
            x.data_ptr(),
            y.data_ptr(),
            _threads(9 * y.numel()),
            isa_index(),
        )
    return y


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(work: int) -> int:
    return 1 if work < _SMALL else torch.get_num_threads()
