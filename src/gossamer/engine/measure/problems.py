"""Data of one's own as problems to train on: images with labels, and text.

The batch of a step depends on the seed and the step alone, so that a run continues where it was
killed without any state of a data loader.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.text import next_token_loss, windows
from gossamer.engine.data import digest
from gossamer.engine.hooks import evaluating
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.engine.measure.tasks import Subject, is_causal

HELD_OUT = 65536
"""Bytes of text on which a language model is measured, at most."""


@dataclass(frozen=True, eq=False)
class ImageProblem:
    """Classification of images, for `measure_training` and `compare_training`.

    Parameters
    ----------
    images, held_out_images : Tensor
        float32 (n, channels, height, width), to train on and to measure the accuracy on.
    labels, held_out_labels : Tensor
        int64 (n,), from 0.
    network : callable
        Gives an untrained network. Its weights come from torch's global generator, which is seeded
        before.
    batch_size : int
        Images in a step. Each epoch is a fresh permutation.
    name, metric, better, optimizer : str
        What reports call the problem and its quality, and what suits its networks.

    Examples
    --------
    >>> from functools import partial
    >>> import gossamer as gs
    >>> from gossamer.testbed import digits
    >>> from gossamer.testbed.networks import cnn
    >>> problem = gs.ImageProblem(*digits(), network=partial(cnn, 1, 10))
    >>> problem.build(seed=0)(problem.images[:2]).shape
    torch.Size([2, 10])
    """

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    network: Callable[[], nn.Module]
    batch_size: int = 64
    name: str = "images"
    metric: str = "accuracy"
    better: str = "higher"
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        pairs = {"images": self.labels, "held_out_images": self.held_out_labels}
        for what, labels in pairs.items():
            images = getattr(self, what)
            if images.dim() != 4 or len(images) != len(labels) or not len(labels):
                raise UsageError(
                    f"{what} are (n, channels, height, width) with n labels, not "
                    f"{tuple(images.shape)} with {len(labels)}"
                )
        if not 1 <= self.batch_size <= len(self.labels):
            raise UsageError(
                f"the batch size is at most the {len(self.labels)} training images and at least 1, "
                f"not {self.batch_size}"
            )

    def build(self, seed: int) -> nn.Module:
        """An untrained network with weights from the seed."""
        torch.manual_seed(seed)
        return self.network()

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Cross-entropy of the batch of this step."""
        steps = len(self.labels) // self.batch_size
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step // steps)
        rows = torch.randperm(len(self.labels), generator=generator)
        rows = rows[step % steps * self.batch_size :][: self.batch_size]
        return nn.functional.cross_entropy(model(self.images[rows]), self.labels[rows])

    def quality(self, model: nn.Module) -> float:
        """The share of held-out images classified rightly."""
        with evaluating(model):
            found = torch.cat([model(part).argmax(1) for part in self.held_out_images.split(512)])
        return float((found == self.held_out_labels).double().mean())

    def inputs(self) -> list[Tensor]:
        """The training images in batches."""
        return list(self.images.split(self.batch_size))

    def facts(self) -> dict[str, Any]:
        """A hash of all images and labels, and the batch size."""
        every = (self.images, self.labels, self.held_out_images, self.held_out_labels)
        data = digest((str(index), part) for index, part in enumerate(every))
        return {"data": data, "batch size": self.batch_size}


@dataclass(frozen=True, eq=False)
class TextProblem:
    """A causal language model on text, for `measure_training` and `compare_training`.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers. Copies of it are trained.
    text, held_out : bytes
        To train on, and to measure the bits per byte on. At most 65536 bytes are measured.
    tokenizer : object, optional
        The model's, as transformers gives it. None where a byte is a token.
    scratch : bool
        Train the model's architecture from random weights.
    batch_size : int
        Windows of text in a step.
    length : int
        Tokens in a window.
    progress : bool
        Show a bar on stderr while the quality is measured.
    name, metric, better, optimizer : str
        What reports call the problem and its quality, and what suits its models.

    Examples
    --------
    >>> import gossamer as gs
    >>> from gossamer.testbed import calibration_text, heldout_text, language_model
    >>> problem = gs.TextProblem(language_model(), calibration_text(), heldout_text(), length=64)
    >>> round(problem.loss(problem.build(seed=0), step=0, seed=0).item(), 1)
    1.0
    """

    model: nn.Module
    text: bytes
    held_out: bytes
    tokenizer: Any = None
    scratch: bool = False
    batch_size: int = 64
    length: int = 128
    progress: bool = False
    name: str = "text"
    metric: str = "bits per byte"
    better: str = "lower"
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if not is_causal(self.model):
            raise UsageError(f"{type(self.model).__name__} is no causal language model")
        if self.batch_size < 1 or self.length < 2:
            raise UsageError("the batch size is at least 1 and the length at least 2")
        if self.ids.numel() <= self.length:
            raise UsageError(
                f"the text holds {self.ids.numel()} tokens; windows of {self.length} need more text"
            )
        config: Any = getattr(self.model, "config", None)
        limit = getattr(config, "max_position_embeddings", self.length)
        if self.length > limit:
            raise UsageError(f"the length is at most the model's {limit} positions")

    @cached_property
    def ids(self) -> Tensor:
        """int64 (tokens,), of the text to train on."""
        return self._subject.ids(self.text)

    def build(self, seed: int) -> nn.Module:
        """A copy of the model, or with `scratch` its architecture untrained."""
        model: Any = self.model
        torch.manual_seed(seed)
        built: nn.Module = type(model)(model.config) if self.scratch else copy.deepcopy(model)
        return built

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Next-token cross-entropy of random windows."""
        rows = windows(self.ids, self.batch_size, self.length, seed * 1_000_003 + step)
        return next_token_loss(model, rows)

    def quality(self, model: nn.Module) -> float:
        """Bits per byte of held-out text."""
        return bits_per_byte(
            model, self.held_out[:HELD_OUT], window=self.length, encode=self._subject.encode,
            progress="quality on held-out text" if self.progress else "",
        )  # fmt: skip

    def inputs(self) -> None:
        """None: language models have no batch norms."""
        return None

    def facts(self) -> dict[str, Any]:
        """A hash of the text, and how windows are drawn from it."""
        data = blake2b(self.text + b"\0" + self.held_out, digest_size=16).hexdigest()
        return {"data": data, "batch size": self.batch_size, "length": self.length}

    @property
    def _subject(self) -> Subject:
        return Subject(self.model, self.tokenizer)
