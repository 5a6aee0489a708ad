"""Products by a copy of the weights prepared for speed, where it is there and suits the input.

The choice lies inside the operators, so that compilers record one call for any number of rows.
Each takes the packed matrix too: it serves what the copy does not, and gradients, and it is what
counts where the copy is out of date.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.ops import _dispatch, blocks, sell
from gossamer.ops import bitmap as bitmaps
from gossamer.ops import conv as convs
from gossamer.ops import nm as nms
from gossamer.ops.bitmap.native import MATVEC_ROWS
from gossamer.ops.blocks import Blocks
from gossamer.ops.conv import Epilogue, Form, Window
from gossamer.ops.nm import Layout
from gossamer.ops.sell import Sell

BatchForm = Sell | Blocks


def version(values: Tensor) -> int:
    """Changes when the values are written to or replaced."""
    written = 0 if values.is_inference() else values._version
    return hash((values.data_ptr(), written, values.dtype))


def linear(
    x: Tensor,
    form: BatchForm,
    stamp: int,
    packed: list[Tensor],
    facts: list[int],
    bias: Tensor | None,
) -> Tensor:
    """x (..., in) times the matrix transposed, plus bias: by `form` for more than 8 rows.

    stamp: `version` of the values from which the form was made. packed, facts: of a bitmap values,
    bitmap, offsets and any columns, with the inputs and `unpack_from` or -1; of N:M values and
    codes, with keep, group and inputs. Differentiable in x and bias.
    """
    return _prepared_linear(x, bias, _parts(form), list(form.shape), packed, facts, stamp)


def suits(x: Tensor, in_features: int) -> bool:
    """Whether a form for batches serves this input."""
    many = x.numel() > MATVEC_ROWS * in_features
    return many and x.dtype in (torch.float32, torch.bfloat16) and x.is_cpu


def by_form(x: Tensor, form: BatchForm, bias: Tensor | None) -> Tensor:
    """The product by the form alone."""
    return (blocks if isinstance(form, Blocks) else sell).linear(x, form, bias)


def _parts(form: BatchForm) -> list[Tensor]:
    if isinstance(form, Blocks):
        return [form.values, form.columns, form.splits]
    return [form.values, form.columns, form.rows, form.groups, form.offsets]


def _form(parts: list[Tensor], shape: list[int]) -> BatchForm:
    size = (shape[0], shape[1])
    if len(parts) == 3:
        return Blocks(parts[0], parts[1], parts[2], size)
    return Sell(parts[0], parts[1], parts[2], parts[3], parts[4], size)


@torch.library.custom_op("gossamer::prepared_linear", mutates_args=())
def _prepared_linear(
    x: Tensor,
    bias: Tensor | None,
    form: list[Tensor],
    shape: list[int],
    packed: list[Tensor],
    facts: list[int],
    stamp: int,
) -> Tensor:
    if version(packed[0]) == stamp and suits(x, shape[1]):
        return _dispatch.owned(by_form(x, _form(form, shape), bias))
    if len(facts) == 3:
        return _dispatch.owned(nms.linear(x, packed[0], packed[1], bias, Layout(*facts)))
    values, bitmap, offsets, *columns = packed
    start = None if facts[1] < 0 else facts[1]
    kept = columns[0] if columns else None
    result = bitmaps.linear(x, values, bitmap, offsets, bias, facts[0], start, kept)
    return _dispatch.owned(result)


@_prepared_linear.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    form: list[Tensor],
    shape: list[int],
    packed: list[Tensor],
    facts: list[int],
    stamp: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, form, _, packed, facts, _ = inputs
    ctx.save_for_backward(*packed)
    ctx.facts, ctx.bias, ctx.parts = facts, bias is not None, len(form)


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        packed = ctx.saved_tensors
        if len(ctx.facts) == 3:
            dense = nms.matrix(packed[0], packed[1], Layout(*ctx.facts))
        else:
            dense = bitmaps.matrix(packed[0], packed[1], packed[2], ctx.facts[0])
        grad_x = (grad.float() @ dense.float()).to(grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.bias else None
    nothing = [None] * ctx.parts, [None] * len(ctx.saved_tensors)
    return grad_x, grad_bias, nothing[0], None, nothing[1], None, None


_prepared_linear.register_autograd(_backward_linear, setup_context=_setup_linear)


def conv(
    x: Tensor,
    form: Form,
    stamp: int,
    packed: list[Tensor],
    window: Window,
    bias: Tensor | None,
) -> Tensor:
    """x (images, channels, height, width) float32 through the convolution; as `ops.conv.conv`.

    packed: values, bitmap and offsets of the matrix (out, taps * channels) from which the form was
    made, at `stamp`. Differentiable in x and bias, at the memory of one dense weight.
    """
    parts = [form.values, form.columns, form.counts, form.rows]
    shape = [*form.shape, int(form.tiled)]
    numbers = [*window.kernel, *window.stride, *window.padding]
    return _prepared_conv(x, bias, parts, shape, packed, numbers, stamp)


def dense_weight(packed: list[Tensor], depth: int, kernel: tuple[int, int]) -> Tensor:
    """The weight (out, channels, height, width) of a packed convolution."""
    matrix = bitmaps.matrix(packed[0], packed[1], packed[2], depth)
    return matrix.reshape(matrix.shape[0], *kernel, -1).permute(0, 3, 1, 2).contiguous()


def _window(numbers: list[int]) -> Window:
    a, b, c, d, e, f = numbers
    return Window((a, b), (c, d), (e, f))


@torch.library.custom_op("gossamer::prepared_conv", mutates_args=())
def _prepared_conv(
    x: Tensor,
    bias: Tensor | None,
    form: list[Tensor],
    shape: list[int],
    packed: list[Tensor],
    numbers: list[int],
    stamp: int,
) -> Tensor:
    window = _window(numbers)
    if version(packed[0]) == stamp:
        kept = Form(form[0], form[1], form[2], form[3], (shape[0], shape[1]), bool(shape[2]))
        return convs.conv(x, kept, window, Epilogue(bias, *FREE))
    weight = dense_weight(packed, shape[1], window.kernel).to(x.dtype)
    return functional.conv2d(x, weight, bias, window.stride, window.padding)


@_prepared_conv.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    form: list[Tensor],
    shape: list[int],
    packed: list[Tensor],
    numbers: list[int],
    stamp: int,
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0], *_window(numbers).outputs(x.shape[2], x.shape[3]))


FREE = (convs.NO_EPILOGUE.low, convs.NO_EPILOGUE.high)
"""The clamp that changes nothing."""


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, form, shape, packed, numbers, _ = inputs
    ctx.save_for_backward(x, *packed)
    ctx.depth, ctx.numbers, ctx.bias, ctx.parts = shape[1], numbers, bias is not None, len(form)


def _backward_conv(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *packed = ctx.saved_tensors
    grad_x, window = None, _window(ctx.numbers)
    if ctx.needs_input_grad[0]:
        weight = dense_weight(packed, ctx.depth, window.kernel).to(grad.dtype)
        grad_x = torch.ops.aten.convolution_backward(
            grad, x, weight, None, window.stride, window.padding, (1, 1), False, (0, 0), 1,
            (True, False, False),
        )[0]  # fmt: skip
    grad_bias = grad.sum((0, 2, 3)) if ctx.bias else None
    nothing = [None] * ctx.parts, [None] * len(packed)
    return grad_x, grad_bias, nothing[0], None, nothing[1], None, None


_prepared_conv.register_autograd(_backward_conv, setup_context=_setup_conv)
