"""Handwritten digits for a small perceptron: seconds per training run on one core."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.testbed.bundled import digits


@dataclass(frozen=True)
class Digits:
    """Classification of scikit-learn's 8x8 digits; the quality is the accuracy.

    split: seed that says which quarter is held out. widths: of the hidden layers. norm: a BatchNorm
    after each of them. Its eps is 1e-3, because growth by gradient goes astray with 1e-5
    (benchmarks/cases/rigl_stability.py).
    """

    split: int = 0
    widths: tuple[int, ...] = (128, 64)
    norm: bool = False
    batch_size: int = 64
    name: str = "digits"
    metric: str = "accuracy"
    better: str = "higher"
    optimizer: str = "sgd"

    @cached_property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images, training labels, held-out images, held-out labels."""
        return digits(seed=self.split)

    def build(self, seed: int) -> nn.Module:
        """An untrained perceptron: 64 inputs, the hidden layers, 10 classes."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise((64, *self.widths)):
            norm = [nn.BatchNorm1d(outputs, 1e-3)] if self.norm else []
            layers += [nn.Linear(inputs, outputs), *norm, nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.widths[-1], 10))

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images and labels of this step, drawn with replacement."""
        images, labels, _, _ = self.data
        generator = torch.Generator().manual_seed(7919 * seed + step)
        rows = torch.randint(0, len(images), (self.batch_size,), generator=generator)
        return images[rows], labels[rows]

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Cross-entropy on the batch of this step."""
        images, labels = self.batch(step, seed)
        return nn.functional.cross_entropy(model(images), labels)

    def quality(self, model: nn.Module) -> float:
        """The share of held-out digits that are right; the model's mode is restored."""
        _, _, images, labels = self.data
        training = model.training
        model.eval()
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).double().mean()
        model.train(training)
        return float(right)

    def inputs(self) -> list[Tensor]:
        """The training images in batches."""
        return list(self.data[0].split(self.batch_size))

    def facts(self) -> dict[str, Any]:
        """Which digits are held out, and the batch size."""
        return {"data": self.name, "split": self.split, "batch size": self.batch_size}
