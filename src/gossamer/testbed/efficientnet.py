"""EfficientNet-lite0 as plain torch modules: ReLU6, no squeeze and excitation.

EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (2019); the lite variants
are TensorFlow's, whose padding of strided convolutions `Same` keeps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip
"""Kernel, stride of the first block, expansion, channels, blocks."""


class Same(nn.Module):
    """Zeros around an image so that a strided convolution gives ceil(size / stride)."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """The larger half of the zeros goes below and to the right."""
        sizes = []
        for size in (x.shape[-1], x.shape[-2]):
            steps = -(-size // self.stride) - 1
            total = max(steps * self.stride + self.kernel - size, 0)
            sizes += [total // 2, total - total // 2]
        return functional.pad(x, sizes)


class Unit(nn.Sequential):
    """A convolution with its batch norm, and ReLU6 unless `linear`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1,
        linear: bool = False,
    ) -> None:  # fmt: skip
        padding = kernel // 2 if stride == 1 else 0
        super().__init__()
        if stride > 1:
            self.add_module("pad", Same(kernel, stride))
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.add_module("conv", convolution)
        self.add_module("norm", nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01))
        if not linear:
            self.add_module("act", nn.ReLU6())


class Block(nn.Module):
    """Expand, filter each channel, project; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.expand = Unit(inputs, inner) if expand > 1 else nn.Identity()
        self.depthwise = Unit(inner, inner, kernel, stride, groups=inner)
        self.project = Unit(inner, outputs, linear=True)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, height, width) to (n, outputs, height / stride, width / stride)."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Logits of the 1000 classes of ImageNet; images are (n, 3, 224, 224), (value - 127) / 128."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        width = 32
        for kernel, stride, expand, channels, count in STAGES:
            for index in range(count):
                blocks.append(Block(width, channels, kernel, 1 if index else stride, expand))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = Unit(width, 1280)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (n, 1000)."""
        logits: Tensor = self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict (`_blocks.3._bn1.weight`) under the names of the modules here."""
    return {_name(name): tensor for name, tensor in state.items()}


def _name(name: str) -> str:
    outer = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv",
             "_bn1": "head.norm", "_fc": "classifier"}  # fmt: skip
    inner = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_bn1": "depthwise.norm",
             "_depthwise_conv": "depthwise.conv", "_project_conv": "project.conv",
             "_bn2": "project.norm"}  # fmt: skip
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
    if block:
        return f"blocks.{block[1]}.{inner[block[2]]}.{block[3]}"
    layer, _, rest = name.partition(".")
    return f"{outer[layer]}.{rest}"
