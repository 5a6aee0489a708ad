"""Convolutions whose weight is stored as kept values and a bitmap, and dense depthwise ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.errors import UsageError
from gossamer.core.matrix import as_matrix, why_not_plain
from gossamer.nn.packed.base import PackedLayer
from gossamer.nn.packed.bitmap import BitmapLinear
from gossamer.ops import _dispatch, prepared
from gossamer.ops import bitmap as bitmap_ops
from gossamer.ops import conv as ops
from gossamer.ops._dispatch import direct
from gossamer.ops.conv import Depthwise, Epilogue, Form, Window
from gossamer.ops.prepared import FREE, version


class PackedConv2d(PackedLayer):
    """A convolution of one group with most weights zero.

    Stored as `BitmapLinear` is, of the matrix (out, taps * channels) that `core.matrix.as_matrix`
    makes of a Conv2d, values float32 or bfloat16. The kernel works in float32, whatever the images
    are in; its form, about 6 bytes per kept weight, is made from the values and never saved.
    """

    values: Tensor
    bitmap: Tensor
    row_ptr: Tensor

    def __init__(self, weight: BitmapLinear, window: Window | None = None) -> None:
        super().__init__()
        window = Window() if window is None else window
        if min(window.stride) < 1 or (window.stride[1] > 2 and not _sliced(window)):
            raise UsageError(f"stride is from 1, horizontally 1 or 2, not {window.stride}")
        if weight.in_features % (window.kernel[0] * window.kernel[1]):
            raise UsageError(f"{weight.in_features} weights do not fit a kernel {window.kernel}")
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.pattern, self.requested_density = weight.pattern, weight.requested_density
        self.window = window
        self.register_buffer("values", weight.values)
        self.register_buffer("bitmap", weight.bitmap)
        self.register_buffer("row_ptr", weight.row_ptr, persistent=False)
        self.bias = weight.bias
        self._form: tuple[int, Form] | None = None
        self._form = (version(self.values), self.make_form())

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, weight: BitmapLinear) -> PackedConv2d:
        """With the kernel, stride and padding of a Conv2d that `why_not` does not refuse."""
        return cls(weight, window_of(conv))

    def to_matrix(self) -> Tensor:
        """The dense weight (out, taps * channels) in the dtype of the values."""
        return bitmap_ops.matrix(self.values, self.bitmap, self.row_ptr, self.in_features)

    def like(self) -> Tensor:
        """The values."""
        return self.values

    def make_form(self) -> Form:
        """What the kernel reads."""
        return ops.build(self.to_matrix())

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Output and input channels, height and width."""
        high, wide = self.window.kernel
        return (self.out_features, self.in_features // (high * wide), high, wide)

    def dense_weight(self) -> Tensor:
        """A new tensor: the dense weight (out, in, height, width)."""
        packed = [self.values, self.bitmap, self.row_ptr]
        return prepared.dense_weight(packed, self.in_features, self.window.kernel)

    @property
    def density(self) -> float:
        """The fraction of weights stored."""
        return self.values.numel() / max(1, self.in_features * self.out_features)

    @property
    def kernel(self) -> str:
        """The name of the kernel that serves it here."""
        return ops.kernel_name(ops.suits_tiles(self.to_matrix()))

    def product(self, x: Tensor) -> Tensor:
        """x (images, channels, height, width), or one image, to (images, out, height', width')."""
        if x.dim() == 3:
            return self.product(x.unsqueeze(0)).squeeze(0)
        bias = None if self.bias is None else self.bias.float()
        images, window = x.float(), self.window
        if window.stride[1] > 2:  # more than the kernel knows, so only of a 1x1 convolution
            images, window = images[..., :: window.stride[0], :: window.stride[1]], Window()
        if not torch.compiler.is_compiling():
            self.refresh()
        assert self._form is not None
        stamp, form = self._form
        ops.check_images(images, self.weight_shape[1])
        if direct(x, bias):
            return ops.conv(images, form, window, Epilogue(bias, *FREE)).to(x.dtype)
        packed = [self.values, self.bitmap, self.row_ptr]
        return prepared.conv(images, form, stamp, packed, window, bias).to(x.dtype)

    def dense_product(self, x: Tensor) -> Tensor:
        """By torch's convolution."""
        weight, window = self.dense_weight(), self.window
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        images = x.to(weight.dtype)
        y = functional.conv2d(images, weight, bias, window.stride, window.padding)
        return y.to(x.dtype)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        values, bitmap = state.get(prefix + "values"), state.get(prefix + "bitmap")
        if getattr(values, "shape", None) == self.values.shape and bitmap is not None:
            # other zeros, other offsets: checked before anything is written
            self.row_ptr = bitmap_ops.row_offsets(values, bitmap, self.in_features)
        super()._load_from_state_dict(state, prefix, *args)
        self.refresh()

    def extra_repr(self) -> str:
        """Shape, density and window."""
        taps = self.window.kernel[0] * self.window.kernel[1]
        return (
            f"in_channels={self.in_features // taps}, out_channels={self.out_features}, "
            f"{self.window}, density={self.density:.3f}, bias={self.bias is not None}"
        )


class DepthwiseConv2d(nn.Module):
    """A dense 3x3 depthwise convolution, padding 1, faster than torch's with channels first.

    Weight (channels, 1, 3, 3) and bias under the names that Conv2d gives them. torch's convolution
    serves gradients, tracing and other dtypes and devices.
    """

    own: frozenset[str] = frozenset()
    kind: type[nn.Module] | None = None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not serves_depthwise(conv):
            raise UsageError("expected a 3x3 depthwise convolution with padding 1, stride 1 or 2")
        self.weight, self.bias = conv.weight, conv.bias
        self.step = conv.stride[0]

    def forward(self, input: Tensor) -> Tensor:
        """input (images, channels, height, width), or one image."""
        x, weight, bias = input, self.weight, self.bias
        plain = x.dim() == 4 and _dispatch.plain(x) and weight.is_cpu
        plain = plain and weight.dtype == x.dtype == torch.float32
        if plain and direct(x, weight, bias):
            return ops.depthwise(x, Depthwise(weight, self.step, Epilogue(bias, *FREE)))
        groups = weight.shape[0]
        return functional.conv2d(x, weight, bias, self.step, padding=1, groups=groups)

    def extra_repr(self) -> str:
        """Channels and stride."""
        return f"channels={self.weight.shape[0]}, stride={self.step}"


def window_of(conv: nn.Conv2d) -> Window:
    """Kernel, stride and padding; raises UsageError for `same` with an even kernel."""
    kernel = (conv.kernel_size[0], conv.kernel_size[1])
    padding: str | tuple[int, ...] = conv.padding
    if padding == "same":
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            raise UsageError("padding `same` of an even kernel has no kernel here")
        padding = (kernel[0] // 2, kernel[1] // 2)
    elif isinstance(padding, str):
        padding = (0, 0)
    return Window(kernel, (conv.stride[0], conv.stride[1]), (padding[0], padding[1]))


def _sliced(window: Window) -> bool:
    """Whether the stride only drops pixels of the input."""
    return window.kernel == (1, 1) and window.padding == (0, 0)


def serves_depthwise(module: nn.Module) -> bool:
    """Whether `DepthwiseConv2d` can take this module's place."""
    return (
        type(module) is nn.Conv2d
        and why_not_plain(module) is None
        and module.weight.shape == (module.groups, 1, 3, 3)
        and module.weight.dtype == torch.float32
        and module.weight.is_cpu
        and module.padding in ((1, 1), "same")
        and module.padding_mode == "zeros"
        and module.dilation == (1, 1)
        and module.stride in ((1, 1), (2, 2))
    )


def no_kernel(conv: nn.Conv2d) -> str | None:
    """Why no kernel can run this convolution; None where one can."""
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or conv.groups != 1:
        return "a dilated, grouped or otherwise padded convolution has no kernel"
    try:
        window = window_of(conv)
    except UsageError as error:
        return str(error)
    if window.stride[1] > 2 and not _sliced(window):
        return f"a convolution of stride {window.stride} has no kernel"
    if conv.weight[0].numel() > ops.MAX_DEPTH:
        return f"the kernel takes up to {ops.MAX_DEPTH} weights per output"
    if conv.weight.dtype != torch.float32:
        return f"no convolution kernel for {conv.weight.dtype}"
    return None


def why_not(conv: nn.Conv2d, density: float) -> str | None:
    """Why `PackedConv2d` should not take this convolution's place; None where it should."""
    if (reason := no_kernel(conv)) is not None:
        return reason
    if density <= MAX_DENSITY:
        return None
    most = MAX_GROUPED if ops.sharing(as_matrix(conv)) >= GROUPED else MAX_DENSITY
    if density <= most:
        return None
    return f"at density {density:.2f} the dense convolution is faster; at most {most:g}"


MAX_DENSITY = 0.25
"""Above this torch's dense convolution, channels last, wins: see benchmarks/results/conv.json."""
MAX_GROUPED, GROUPED = 0.4, 3.0
"""The same where so many of four neighbouring outputs on average keep an input that any keeps."""
