"""Dense 3x3 depthwise convolution on channels-first images: see csrc/depthwise.hpp.

Sparse 1x1 convolutions want channels first, where torch's depthwise convolution takes most of the
time of a small network; without this the sparse network would lose what its zeros gained.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.depthwise import native, reference

__all__ = ["conv"]


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """x (images, channels, height, width) with weight (channels, 1, 3, 3), padding 1, plus bias.

    float32 on the CPU, stride 1 or 2; the result is contiguous. O(9 * outputs). Not differentiable.
    Raises UsageError for other shapes or dtypes.
    """
    channels = weight.shape[0]
    if weight.shape != (channels, 1, 3, 3) or stride not in (1, 2):
        raise UsageError(f"expected (channels, 1, 3, 3) and stride 1 or 2, not {weight.shape}")
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < 1:
        raise UsageError(f"expected images of {channels} channels, not {tuple(x.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise UsageError(f"bias has shape {tuple(bias.shape)}, not ({channels},)")
    for part in (x, weight, *(() if bias is None else (bias,))):
        if part.dtype != torch.float32 or not part.is_cpu:
            raise UsageError(f"expected float32 on the CPU, not {part.dtype} on {part.device}")
    eager = not torch.compiler.is_compiling()
    if eager and not (torch.is_grad_enabled() and x.requires_grad):
        return _run(x, weight, bias, stride)
    return _depthwise_conv(x, weight, bias, stride)


def _home() -> ModuleType:
    return reference if _dispatch.isa_index() < 0 else native


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    bias = None if bias is None else bias.detach().contiguous()
    return _home().conv(x.contiguous(), weight.detach().contiguous(), bias, stride)


@torch.library.custom_op("gossamer::depthwise_conv", mutates_args=())
def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    return _run(x, weight, bias, stride)


@_depthwise_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    return x.new_empty(x.shape[0], x.shape[1], height, width)
