"""Small networks for images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def cnn(channels: int, classes: int, width: int = 8) -> nn.Sequential:
    """Three convolutions of `width`, twice and four times as many channels, with batch norms."""
    w = width
    return nn.Sequential(
        nn.Conv2d(channels, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU(),
        nn.Conv2d(w, 2 * w, 3, padding=1), nn.BatchNorm2d(2 * w), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * w, 4 * w, 3, padding=1), nn.BatchNorm2d(4 * w), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * w, classes),
    )  # fmt: skip


def mlp(shape: Sequence[int], classes: int, width: int = 256) -> nn.Sequential:
    """Two hidden layers of `width` units for images of a shape (channels, height, width)."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, width),
        nn.ReLU(), nn.Linear(width, classes),
    )  # fmt: skip
