"""What timm imports of torchvision at module level, where torchvision is not installed.

Its wheels need one release of torch exactly. The models of timm compute nothing with it: it wants
the class of frozen norms to recognise them, and names of picture transforms, which stay empty here.
Only processes of the sweep that build a timm model call this.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from torch import nn


class FrozenBatchNorm2d(nn.Module):
    """Never built here; timm asks whether a module is one."""


class InterpolationMode(enum.Enum):
    """The names by which pictures are resized."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Nothing:
    """A transform or a data set that cannot be used."""


def stand_in() -> None:
    """Put the names in place; does nothing where torchvision is installed."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    sets = ("CIFAR100", "CIFAR10", "MNIST", "KMNIST", "FashionMNIST", "ImageFolder")
    contents = {
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.misc": {"FrozenBatchNorm2d": FrozenBatchNorm2d},
        "torchvision.transforms": {"ToTensor": Nothing, "InterpolationMode": InterpolationMode},
        "torchvision.transforms.functional": {"InterpolationMode": InterpolationMode},
        "torchvision.datasets": dict.fromkeys(sets, Nothing),
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(values)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
