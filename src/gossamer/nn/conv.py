"""A 1x1 convolution whose weight is stored as kept values and a bitmap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.nn.bitmap import BitmapLinear, _version
from gossamer.ops import bitmap as bitmap_ops
from gossamer.ops import depthwise, pointwise
from gossamer.ops.pointwise import Pointwise


class PointwiseConv2d(nn.Module):
    """y[n, o, h, w] = sum over i of W[o, i] x[n, i, s h, s w] + b[o], with stride s, for inference.

    Stored as `BitmapLinear` is, values float32 or bfloat16; images are float32 on the CPU. The form
    that the kernel reads, about 6 bytes per kept weight, is made from the values and never saved.
    """

    values: Tensor
    bitmap: Tensor

    def __init__(self, weight: BitmapLinear, stride: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        if min(stride) < 1:
            raise UsageError(f"stride is from 1, not {stride}")
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.pattern, self.density_requested = weight.pattern, weight.density_requested
        self.stride = stride
        self.register_buffer("values", weight.values)
        self.register_buffer("bitmap", weight.bitmap)
        self.bias = weight.bias
        self._built: tuple[int, Pointwise] | None = None

    def to_matrix(self) -> Tensor:
        """The dense weight (out, in) in the dtype of the values."""
        return bitmap_ops.unpack(self.values, self.bitmap, self.in_features)

    @property
    def density(self) -> float:
        """The fraction of weights stored."""
        return self.values.numel() / max(1, self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (images, in, height, width) to (images, out, height / stride, width / stride)."""
        if self.stride != (1, 1):
            x = x[..., :: self.stride[0], :: self.stride[1]]
        version = _version(self.values)
        if self._built is None or self._built[0] != version:
            self._built = (version, pointwise.build(self.to_matrix()))
        bias = None if self.bias is None else self.bias.float()
        return pointwise.conv(x, self._built[1], bias)

    def extra_repr(self) -> str:
        """Shape, density and stride."""
        return (
            f"in_channels={self.in_features}, out_channels={self.out_features}, "
            f"stride={self.stride}, density={self.density:.3f}, bias={self.bias is not None}"
        )


class DepthwiseConv2d(nn.Module):
    """A dense 3x3 depthwise convolution, padding 1, faster than torch's with channels first.

    Weight (channels, 1, 3, 3) and bias under the names that Conv2d gives them; for inference.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not serves_depthwise(conv):
            raise UsageError("expected a 3x3 depthwise convolution with padding 1, stride 1 or 2")
        self.weight, self.bias = conv.weight, conv.bias
        self.stride = conv.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (images, channels, height, width), float32."""
        return depthwise.conv(x, self.weight, self.bias, self.stride)

    def extra_repr(self) -> str:
        """Channels and stride."""
        return f"channels={self.weight.shape[0]}, stride={self.stride}"


def serves_depthwise(module: nn.Module) -> bool:
    """Whether `DepthwiseConv2d` can take this module's place."""
    return (
        isinstance(module, nn.Conv2d)
        and module.weight.shape == (module.groups, 1, 3, 3)
        and module.weight.dtype == torch.float32
        and module.weight.is_cpu
        and module.padding == (1, 1)
        and module.padding_mode == "zeros"
        and module.dilation == (1, 1)
        and module.stride in ((1, 1), (2, 2))
    )


def why_not(conv: nn.Conv2d, density: float) -> str | None:
    """Why `PointwiseConv2d` should not take this convolution's place; None where it should."""
    if conv.kernel_size != (1, 1):
        return f"a {conv.kernel_size[0]}x{conv.kernel_size[1]} convolution stays dense"
    padded = isinstance(conv.padding, str) and conv.padding == "same"
    if conv.padding not in ((0, 0), "valid") and not padded:
        return "a padded 1x1 convolution has no kernel"
    if conv.weight.dtype != torch.float32:
        return f"no convolution kernel for {conv.weight.dtype}"
    if density > MAX_DENSITY:
        return f"at density {density:.2f} the dense convolution is faster; at most {MAX_DENSITY:g}"
    return None


MAX_DENSITY = 0.15
"""Above this torch's dense convolution wins: on MobileNet's shapes, two threads, 1x1 convolutions at
density 0.1 took half of its time and the time grows with the density. onnxruntime's dense network
is faster still (benchmarks/results/conv.json)."""
