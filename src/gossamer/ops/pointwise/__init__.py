"""Sparse 1x1 convolution on channels-first images, batch 1 upward: see csrc/pointwise.hpp.

Pixels of one channel are contiguous and fill the vectors, so any unstructured weights will do (Fast
Sparse ConvNets, 2020). The form is a copy of the weights for speed, of about 6 bytes per kept one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.pointwise import native, reference

__all__ = ["Pointwise", "build", "conv", "kernel_name"]


@dataclass(frozen=True)
class Pointwise:
    """A matrix (out, in) cut into groups of 128 outputs and blocks of 128 inputs.

    values float32 (nnz,) and columns uint16 (nnz,), within the block: group after group, block after
    block, outputs with the most kept weights first. rows uint16 (groups * blocks * 128): which
    output of the group that is; row_ptr int64 (groups * blocks * 128 + 1). Made by `build`, which is
    what the kernel trusts.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    row_ptr: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.values, self.columns, self.rows, self.row_ptr)
        return sum(part.nbytes for part in parts)


def kernel_name() -> str:
    """The kernel that serves here, such as `pointwise-conv/avx512`."""
    return f"pointwise-conv/{_dispatch.isa()}"


def build(matrix: Tensor) -> Pointwise:
    """The form of the non-zeros of a matrix (out, in); values become float32. O(out * in)."""
    if matrix.dim() != 2 or not matrix.is_cpu or not matrix.is_floating_point():
        raise UsageError(f"expected a floating-point matrix on the CPU, not {tuple(matrix.shape)}")
    parts = reference.build(matrix.detach().float())
    return Pointwise(*parts, (matrix.shape[0], matrix.shape[1]))


def conv(
    x: Tensor,
    weight: Pointwise,
    bias: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """x (images, in, height, width) float32 to (images, out, height, width), contiguous.

    Adds bias (out,), then clamps to low..high: 0 to infinity is ReLU, 0 to 6 ReLU6; NaN passes.
    Input channels that an output does not keep never touch it, even where x is NaN. Other layouts
    than contiguous are copied first. O(nnz * pixels). Not differentiable. Raises UsageError.
    """
    if x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise UsageError(
            f"expected images of {weight.shape[1]} channels, (images, channels, height, width), "
            f"not {tuple(x.shape)}"
        )
    if x.dtype != torch.float32 or not x.is_cpu:
        raise UsageError(f"images are float32 on the CPU, not {x.dtype} on {x.device}")
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.dtype != torch.float32):
        raise UsageError(f"bias is float32 ({weight.shape[0]},), not {tuple(bias.shape)}")
    if not low <= high:
        raise UsageError(f"low is at most high, not {low} and {high}")
    parts = (weight.values, weight.columns, weight.rows, weight.row_ptr)
    eager = not torch.compiler.is_compiling()
    if eager and not (torch.is_grad_enabled() and x.requires_grad):
        return _run(x, parts, weight.shape, bias, low, high)
    return _pointwise_conv(x, *parts, *weight.shape, bias, low, high)


def _home() -> ModuleType:
    return reference if _dispatch.isa_index() < 0 else native


def _run(
    x: Tensor,
    parts: reference.Parts,
    shape: tuple[int, int],
    bias: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    images, _, height, width = x.shape
    pixels = x.contiguous().reshape(images, shape[1], height * width)
    bias = None if bias is None else bias.detach().contiguous()
    y = _home().conv(pixels, parts, shape, bias, low, high)
    return y.reshape(images, shape[0], height, width)


@torch.library.custom_op("gossamer::pointwise_conv", mutates_args=())
def _pointwise_conv(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    row_ptr: Tensor,
    out: int,
    channels: int,
    bias: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    return _run(x, (values, columns, rows, row_ptr), (out, channels), bias, low, high)


@_pointwise_conv.register_fake
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    row_ptr: Tensor,
    out: int,
    channels: int,
    bias: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    return x.new_empty(x.shape[0], out, x.shape[2], x.shape[3])
