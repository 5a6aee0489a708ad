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
from gossamer.ops.conv.reference import Depthwise, Epilogue, Form, Stage, Window

__all__ = [
    "Depthwise",
    "Epilogue",
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

NO_EPILOGUE = Epilogue(None, -math.inf, math.inf)
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
    epilogue: Epilogue = NO_EPILOGUE,
    prologue: Depthwise | None = None,
) -> Tensor:
    """x (images, channels, height, width) float32 to (images, out, height', width'), contiguous.

    window: kernel, stride and padding with zeros, None for 1x1; horizontal stride 1 or 2. Adds
    the bias (out,), then clamps. prologue: a depthwise convolution of x whose result is the input;
    only for 1x1. Inputs that an output does not keep never touch it, even where x is NaN. Other
    layouts than contiguous are copied first. O(nnz * pixels). Not differentiable. Raises
    UsageError.
    """
    window = Window() if window is None else window
    _check(x, form, window, epilogue, prologue)
    if _dispatch.direct(x):
        return _run(x, form, window, epilogue, prologue)
    first = NO_EPILOGUE if prologue is None else prologue.epilogue
    return _sparse_conv(
        x,
        [form.values, form.columns, form.counts, form.rows],
        [*form.shape, int(form.tiled)],
        [*window.kernel, *window.stride, *window.padding],
        epilogue.bias,
        None if prologue is None else prologue.weight,
        first.bias,
        1 if prologue is None else prologue.stride,
        [first.low, first.high, epilogue.low, epilogue.high],
    )


def depthwise(x: Tensor, convolution: Depthwise) -> Tensor:
    """x (images, channels, height, width) float32 through a 3x3 depthwise convolution and clamp.

    The result is contiguous. O(9 * outputs). Not differentiable. Raises UsageError.
    """
    check_images(x, convolution.weight.shape[0])
    _check_depthwise(convolution)
    if _dispatch.direct(x):
        return _run_depthwise(x, convolution)
    epilogue = convolution.epilogue
    return _depthwise_conv(
        x, convolution.weight, epilogue.bias, convolution.stride, epilogue.low, epilogue.high
    )


def chain(stages: list[Stage]) -> Callable[[Tensor], Tensor]:
    """Stages one after the other, their addresses looked up once; not for gradients or compiling.

    The call takes x (images, channels, height, width) as `conv` does and raises the same errors.
    What lies between stages stays in memory that the callable holds.
    """
    backend = _dispatch.backend(reference, native)
    ready = [
        Stage(s.form, s.window, _ready(s.epilogue), _ready_depthwise(s.prologue)) for s in stages
    ]
    prepared, channels = backend.Chain(ready), ready[0].channels[0]

    def call(x: Tensor) -> Tensor:
        check_images(x, channels)
        return prepared.run(x.contiguous())

    return call


def _run(
    x: Tensor, form: Form, window: Window, epilogue: Epilogue, prologue: Depthwise | None
) -> Tensor:
    backend = _dispatch.backend(reference, native)
    return backend.conv(x.contiguous(), form, window, _ready(epilogue), _ready_depthwise(prologue))


def _run_depthwise(x: Tensor, convolution: Depthwise) -> Tensor:
    return _dispatch.backend(reference, native).depthwise(
        x.contiguous(), _ready_depthwise(convolution)
    )


def _ready(epilogue: Epilogue) -> Epilogue:
    if epilogue.bias is None or (epilogue.bias.is_contiguous() and not epilogue.bias.requires_grad):
        return epilogue
    return Epilogue(epilogue.bias.detach().contiguous(), epilogue.low, epilogue.high)


def _ready_depthwise(convolution: Depthwise | None) -> Depthwise | None:
    if convolution is None:
        return None
    return Depthwise(
        convolution.weight.detach().contiguous(), convolution.stride, _ready(convolution.epilogue)
    )


def check_images(x: Tensor, channels: int) -> None:
    """Raise UsageError for what is not float32 images of so many channels on the CPU."""
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < 1:
        raise UsageError(
            f"expected images of {channels} channels, (images, channels, height, width), "
            f"not {tuple(x.shape)}"
        )
    if x.dtype != torch.float32 or not x.is_cpu:
        raise UsageError(f"images are float32 on the CPU, not {x.dtype} on {x.device}")


def _check_epilogue(epilogue: Epilogue, out: int) -> None:
    bias = epilogue.bias
    if bias is not None and (bias.shape != (out,) or bias.dtype != torch.float32):
        raise UsageError(f"bias is float32 ({out},), not {bias.dtype} {tuple(bias.shape)}")
    if not epilogue.low <= epilogue.high:
        raise UsageError(f"low is at most high, not {epilogue.low} and {epilogue.high}")


def _check_depthwise(convolution: Depthwise) -> None:
    channels, weight = convolution.weight.shape[0], convolution.weight
    if weight.shape != (channels, 1, 3, 3) or convolution.stride not in (1, 2):
        shape = tuple(weight.shape)
        raise UsageError(f"expected a weight (channels, 1, 3, 3) and stride 1 or 2, not {shape}")
    if weight.dtype != torch.float32 or not weight.is_cpu:
        raise UsageError(f"the weight is float32 on the CPU, not {weight.dtype}")
    _check_epilogue(convolution.epilogue, channels)


def _check(
    x: Tensor, form: Form, window: Window, epilogue: Epilogue, prologue: Depthwise | None
) -> None:
    taps = window.kernel[0] * window.kernel[1]
    if taps < 1 or form.shape[1] % taps:
        raise UsageError(f"{form.shape[1]} weights per output do not fit a kernel {window.kernel}")
    check_images(x, form.shape[1] // taps)
    _check_epilogue(epilogue, form.shape[0])
    if min(window.stride) < 1 or window.stride[1] > 2 or min(window.padding) < 0:
        raise UsageError(f"stride is 1 or 2 and padding from 0, not {window}")
    if prologue is not None:
        _check_depthwise(prologue)
        if window != Window() or prologue.weight.shape[0] != x.shape[1]:
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
    prologue = None
    if weight is not None:
        prologue = Depthwise(weight, stride, Epilogue(weight_bias, clamps[0], clamps[1]))
    values, columns, counts, rows = parts
    kept = Form(values, columns, counts, rows, (form[0], form[1]), bool(form[2]))
    return _run(x, kept, _window(window), Epilogue(bias, clamps[2], clamps[3]), prologue)


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
    return _run_depthwise(x, Depthwise(weight, stride, Epilogue(bias, low, high)))


@_depthwise_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, low: float, high: float
) -> Tensor:
    shape = Window((3, 3), (stride, stride), (1, 1)).outputs(x.shape[2], x.shape[3])
    return x.new_empty(x.shape[0], x.shape[1], *shape)


def _window(numbers: list[int]) -> Window:
    a, b, c, d, e, f = numbers
    return Window((a, b), (c, d), (e, f))
