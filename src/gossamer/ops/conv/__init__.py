"""Sparse convolutions on channels-first images, batch 1 upward: see csrc/conv/conv.hpp.

Pixels of one channel are contiguous and fill the vectors, so any unstructured weights will do (Fast
Sparse ConvNets, 2019). Where enough of four neighbouring outputs keep the same inputs, as in groups
of 4 outputs that are pruned together (SparseByteNN, 2023), tiles of them share every load. A dense
3x3 depthwise convolution may run before a 1x1 one, its result never leaving the cache. The form is
a copy of the weights for speed, of about 6 bytes per kept one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.conv import native, reference
from gossamer.ops.conv.reference import Before, Ends, Form, Stage, Window

__all__ = [
    "Before",
    "Ends",
    "Form",
    "Stage",
    "Window",
    "build",
    "chain",
    "check_images",
    "conv",
    "depthwise",
    "kernel_name",
    "sharing",
    "suits_tiles",
]

NO_END = Ends(None, -math.inf, math.inf)
"""Neither bias nor clamp. A clamp from 0 to infinity is ReLU, from 0 to 6 ReLU6."""
MAX_DEPTH = 1 << 16


def kernel_name(tiled: bool | None) -> str:
    """What serves here, such as `sparse-conv/avx512`; None: the depthwise convolution."""
    kind = "depthwise-conv" if tiled is None else "tiled-conv" if tiled else "sparse-conv"
    return f"{kind}/{_dispatch.isa()}"


def build(matrix: Tensor, tiled: bool | None = None) -> Form:
    """The form of the non-zeros of a matrix (out, taps * channels), channels innermost.

    That is `core.matrix.as_matrix` of a Conv2d. Values become float32. tiled: whether outputs come
    in tiles of 4; None: where that is expected to be faster. O(out * depth), at most 65536 deep.
    """
    if matrix.dim() != 2 or not matrix.is_cpu or not matrix.is_floating_point():
        raise UsageError(f"expected a floating-point matrix on the CPU, not {tuple(matrix.shape)}")
    if matrix.shape[1] > MAX_DEPTH:
        raise UsageError(f"the kernel takes up to {MAX_DEPTH} weights per output")
    matrix = matrix.detach().float()
    if tiled is None:
        tiled = suits_tiles(matrix)
    return reference.build_tiles(matrix) if tiled else reference.build_rows(matrix)


_LEAST_SHARING = 1.2
"""From so much sharing on tiles are faster: random weights of density 0.12 have it. Measured with
AVX-512; at density 0.5 tiles then do 1.6 times what single outputs do."""


def suits_tiles(matrix: Tensor) -> bool:
    """Whether `build` puts the non-zeros of a matrix (out, in) into tiles."""
    return sharing(matrix) > _LEAST_SHARING


def sharing(matrix: Tensor) -> float:
    """Mean number of outputs of a tile of 4 that keep a column which any of them keeps."""
    kept = matrix != 0
    tiles = torch.nn.functional.pad(kept, (0, 0, 0, -matrix.shape[0] % reference.ROWS))
    columns = int(tiles.reshape(-1, reference.ROWS, matrix.shape[1]).any(dim=1).sum())
    return int(kept.sum()) / max(1, columns)


def conv(
    x: Tensor,
    form: Form,
    window: Window | None = None,
    ends: Ends = NO_END,
    before: Before | None = None,
) -> Tensor:
    """x (images, channels, height, width) float32 to (images, out, height', width'), contiguous.

    window: kernel, stride and padding with zeros, None for 1x1; horizontal stride 1 or 2. Adds
    the bias (out,), then clamps. before: a depthwise convolution of x whose result is the input;
    only for 1x1. Inputs that an output does not keep never touch it, even where x is NaN. Other
    layouts than contiguous are copied first. O(nnz * pixels). Not differentiable. Raises
    UsageError.
    """
    window = Window() if window is None else window
    _check(x, form, window, ends, before)
    if _dispatch.direct(x):
        return _run(x, form, window, ends, before)
    first = NO_END if before is None else before.ends
    return _sparse_conv(
        x,
        [form.values, form.columns, form.counts, form.rows],
        [*form.shape, int(form.tiled)],
        [*window.kernel, *window.stride, *window.padding],
        ends.bias,
        None if before is None else before.weight,
        first.bias,
        1 if before is None else before.stride,
        [first.low, first.high, ends.low, ends.high],
    )


def depthwise(x: Tensor, before: Before) -> Tensor:
    """x (images, channels, height, width) float32 through a 3x3 depthwise convolution and clamp.

    The result is contiguous. O(9 * outputs). Not differentiable. Raises UsageError.
    """
    check_images(x, before.weight.shape[0])
    _check_before(before)
    if _dispatch.direct(x):
        return _run_depthwise(x, before)
    ends = before.ends
    return _depthwise_conv(x, before.weight, ends.bias, before.stride, ends.low, ends.high)


def chain(stages: list[Stage]) -> Callable[[Tensor], Tensor]:
    """Stages one after the other, their addresses looked up once; not for gradients or compiling.

    The call takes x (images, channels, height, width) as `conv` does and raises the same errors.
    What lies between stages stays in memory that the callable holds.
    """
    home = _dispatch.home(reference, native)
    ready = [Stage(s.form, s.window, _ready(s.ends), _ready_before(s.before)) for s in stages]
    prepared, channels = home.Chain(ready), ready[0].channels[0]

    def call(x: Tensor) -> Tensor:
        check_images(x, channels)
        return prepared.run(x.contiguous())

    return call


def _run(x: Tensor, form: Form, window: Window, ends: Ends, before: Before | None) -> Tensor:
    home = _dispatch.home(reference, native)
    return home.conv(x.contiguous(), form, window, _ready(ends), _ready_before(before))


def _run_depthwise(x: Tensor, before: Before) -> Tensor:
    return _dispatch.home(reference, native).depthwise(x.contiguous(), _ready_before(before))


def _ready(ends: Ends) -> Ends:
    if ends.bias is None or (ends.bias.is_contiguous() and not ends.bias.requires_grad):
        return ends
    return Ends(ends.bias.detach().contiguous(), ends.low, ends.high)


def _ready_before(before: Before | None) -> Before | None:
    if before is None:
        return None
    return Before(before.weight.detach().contiguous(), before.stride, _ready(before.ends))


def check_images(x: Tensor, channels: int) -> None:
    """Raise UsageError for what is not float32 images of so many channels on the CPU."""
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < 1:
        raise UsageError(
            f"expected images of {channels} channels, (images, channels, height, width), "
            f"not {tuple(x.shape)}"
        )
    if x.dtype != torch.float32 or not x.is_cpu:
        raise UsageError(f"images are float32 on the CPU, not {x.dtype} on {x.device}")


def _check_ends(ends: Ends, out: int) -> None:
    bias = ends.bias
    if bias is not None and (bias.shape != (out,) or bias.dtype != torch.float32):
        raise UsageError(f"bias is float32 ({out},), not {bias.dtype} {tuple(bias.shape)}")
    if not ends.low <= ends.high:
        raise UsageError(f"low is at most high, not {ends.low} and {ends.high}")


def _check_before(before: Before) -> None:
    channels, weight = before.weight.shape[0], before.weight
    if weight.shape != (channels, 1, 3, 3) or before.stride not in (1, 2):
        shape = tuple(weight.shape)
        raise UsageError(f"expected a weight (channels, 1, 3, 3) and stride 1 or 2, not {shape}")
    if weight.dtype != torch.float32 or not weight.is_cpu:
        raise UsageError(f"the weight is float32 on the CPU, not {weight.dtype}")
    _check_ends(before.ends, channels)


def _check(x: Tensor, form: Form, window: Window, ends: Ends, before: Before | None) -> None:
    taps = window.kernel[0] * window.kernel[1]
    if taps < 1 or form.shape[1] % taps:
        raise UsageError(f"{form.shape[1]} weights per output do not fit a kernel {window.kernel}")
    check_images(x, form.shape[1] // taps)
    _check_ends(ends, form.shape[0])
    if min(window.stride) < 1 or window.stride[1] > 2 or min(window.padding) < 0:
        raise UsageError(f"stride is 1 or 2 and padding from 0, not {window}")
    if before is not None:
        _check_before(before)
        if window != Window() or before.weight.shape[0] != x.shape[1]:
            raise UsageError("a depthwise convolution of the same channels goes before a 1x1 one")
    elif min(window.outputs(x.shape[2], x.shape[3])) < 1:
        raise UsageError(f"images of {tuple(x.shape[2:])} are smaller than the kernel")


@torch.library.custom_op("gossamer::sparse_conv", mutates_args=())
def _sparse_conv(
    x: Tensor,
    parts: list[Tensor],
    form: list[int],
    window: list[int],
    bias: Tensor | None,
    weight: Tensor | None,
    weight_bias: Tensor | None,
    stride: int,
    clamps: list[float],
) -> Tensor:
    before = None
    if weight is not None:
        before = Before(weight, stride, Ends(weight_bias, clamps[0], clamps[1]))
    values, columns, counts, rows = parts
    kept = Form(values, columns, counts, rows, (form[0], form[1]), bool(form[2]))
    return _run(x, kept, _window(window), Ends(bias, clamps[2], clamps[3]), before)


@_sparse_conv.register_fake
def _(
    x: Tensor,
    parts: list[Tensor],
    form: list[int],
    window: list[int],
    bias: Tensor | None,
    weight: Tensor | None,
    weight_bias: Tensor | None,
    stride: int,
    clamps: list[float],
) -> Tensor:
    shape = Window((3, 3), (stride, stride), (1, 1)) if weight is not None else _window(window)
    return x.new_empty(x.shape[0], form[0], *shape.outputs(x.shape[2], x.shape[3]))


@torch.library.custom_op("gossamer::depthwise_conv", mutates_args=())
def _depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, low: float, high: float
) -> Tensor:
    return _run_depthwise(x, Before(weight, stride, Ends(bias, low, high)))


@_depthwise_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, low: float, high: float
) -> Tensor:
    shape = Window((3, 3), (stride, stride), (1, 1)).outputs(x.shape[2], x.shape[3])
    return x.new_empty(x.shape[0], x.shape[1], *shape)


def _window(numbers: list[int]) -> Window:
    a, b, c, d, e, f = numbers
    return Window((a, b), (c, d), (e, f))
