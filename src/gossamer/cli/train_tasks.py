"""What `gossamer train` trains: data, a model that fits it, a loss for each step, a quality.

The batch of a step depends on the seed and the step alone, so that a run continues where it was
killed without any state of a data loader.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.cli.inputs import BUNDLED, BUNDLED_TEXT, check_model, read_model, read_text
from gossamer.core.errors import FormatError, MissingExtra, UsageError
from gossamer.core.text import windows
from gossamer.engine.data import digest
from gossamer.engine.hooks import evaluating
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.engine.measure.tasks import Subject

Split = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training images, training labels, test images, test labels."""

HELD_OUT = 65536
"""Bytes of text on which a language model is measured, at most."""


class Work(Protocol):
    """Data with models that fit it."""

    metric: str
    better: str

    def build(self, seed: int) -> nn.Module: ...
    def inputs(self) -> list[Tensor] | None: ...
    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor: ...
    def quality(self, model: nn.Module) -> float: ...
    def digest(self) -> str: ...


@dataclass
class Images:
    """Classification of images (n, channels, height, width) by a small CNN or MLP."""

    split: Split
    model: str
    width: int
    batch: int
    metric: str = "accuracy"
    better: str = "higher"

    def build(self, seed: int) -> nn.Module:
        """An untrained network."""
        x, y = self.split[0], self.split[1]
        classes = int(y.max()) + 1
        torch.manual_seed(seed)
        if self.model == "mlp":
            w = self.width or 256
            return nn.Sequential(
                nn.Flatten(), nn.Linear(x[0].numel(), w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(),
                nn.Linear(w, classes),
            )  # fmt: skip
        w = self.width or 8
        return nn.Sequential(
            nn.Conv2d(x.shape[1], w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, padding=1), nn.BatchNorm2d(2 * w), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * w, 4 * w, 3, padding=1), nn.BatchNorm2d(4 * w), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * w, classes),
        )  # fmt: skip

    def inputs(self) -> list[Tensor]:
        """The training images in batches, for statistics of batch norms."""
        return list(self.split[0].split(self.batch))

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Cross-entropy of a batch; each epoch is a fresh permutation."""
        x, y = self.split[0], self.split[1]
        batches = max(1, len(y) // self.batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step // batches)
        rows = torch.randperm(len(y), generator=generator)
        rows = rows[step % batches * self.batch :][: self.batch]
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    def quality(self, model: nn.Module) -> float:
        """The share of test images classified rightly."""
        x, y = self.split[2], self.split[3]
        with evaluating(model):
            found = torch.cat([model(part).argmax(1) for part in x.split(512)])
        return float((found == y).double().mean())

    def digest(self) -> str:
        """A hash of all images and labels."""
        return digest((str(index), part) for index, part in enumerate(self.split))


@dataclass
class Text:
    """A causal language model on text."""

    train: bytes
    held_out: bytes
    model: str
    scratch: bool
    batch: int
    length: int
    metric: str = "bits per byte"
    better: str = "lower"
    _subject: Subject | None = None
    _ids: Tensor | None = None

    def build(self, seed: int) -> nn.Module:
        """The model of the folder, or with `scratch` its architecture untrained."""
        self._subject = read_model(self.model, "float32")
        if not self._subject.causal:
            raise UsageError(f"--model {self.model}: is no causal language model")
        self._ids = self._subject.ids(self.train)
        if self._ids.numel() <= self.length:
            raise UsageError(
                f"--data holds {self._ids.numel()} tokens; windows of {self.length} need more text"
            )
        model: Any = self._subject.model
        limit = getattr(model.config, "max_position_embeddings", self.length)
        if self.length > limit:
            raise UsageError(f"--length is at most the model's {limit} positions")
        torch.manual_seed(seed)
        built: nn.Module = type(model)(model.config) if self.scratch else model
        return built

    def inputs(self) -> None:
        """None: language models have no batch norms."""
        return None

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Next-token cross-entropy of random windows."""
        assert self._ids is not None
        rows = windows(self._ids, self.batch, self.length, seed * 1_000_003 + step)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    def quality(self, model: nn.Module) -> float:
        """Bits per byte of held-out text."""
        assert self._subject is not None
        return bits_per_byte(
            model, self.held_out[:HELD_OUT], window=self.length, encode=self._subject.encode,
            progress="quality on held-out text",
        )  # fmt: skip

    def digest(self) -> str:
        """A hash of the text."""
        return blake2b(self.train + b"\0" + self.held_out, digest_size=16).hexdigest()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's folder, or None."""
        return None if self._subject is None else self._subject.tokenizer


def read_work(
    data: str, model: str, *, scratch: bool, width: int, batch: int, length: int, seed: int
) -> Images | Text:
    """The task that `--data` and `--model` name together; raises UsageError where they do not fit."""
    if batch < 1 or length < 2 or width < 0:
        raise UsageError("--batch is at least 1, --length at least 2, --width at least 0")
    small = model in ("cnn", "mlp")
    kind, _, place = data.partition(":")
    if kind in IMAGES:
        if not small:
            raise UsageError(f"--data {data} is images: choose --model cnn or mlp, not {model!r}")
        split = IMAGES[kind](Path(place), seed)
        if batch > len(split[1]):
            raise UsageError(f"--batch is at most the {len(split[1])} training images")
        return Images(split, model, width, batch)
    if data != BUNDLED_TEXT and not Path(data).exists():
        raise UsageError(
            f"--data {data}: choose digits, fashion-mnist:FOLDER, images:FOLDER, {BUNDLED_TEXT}, or "
            "a text file or folder that exists"
        )
    if small:
        raise UsageError(
            f"--data {data} is text: choose --model {BUNDLED} or a Hugging Face folder; a folder of "
            "images is --data images:FOLDER"
        )
    check_model(model)
    train, held_out = _texts(data)
    return Text(train, held_out, model, scratch, batch, length)


def _texts(data: str) -> tuple[bytes, bytes]:
    from gossamer.testbed import calibration_text, heldout_text

    text = read_text(data, "--data", calibration_text)
    if data == BUNDLED_TEXT:
        return text, heldout_text()
    cut = max(1, len(text) * 9 // 10)
    return text[:cut], text[cut:]


def read_digits(folder: Path, seed: int) -> Split:
    """scikit-learn's digits; the seed says which quarter is held out."""
    from gossamer.testbed import digits

    return digits(seed=seed)


def read_idx(folder: Path, seed: int) -> Split:
    """The four files of (Fashion-)MNIST, plain or gzipped, as distributed."""
    names = [f"{part}-{what}" for part in ("train", "t10k")
             for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]  # fmt: skip
    found = [_idx(folder, name) for name in names]
    for images, labels in (found[:2], found[2:]):
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or not len(labels):
            raise FormatError(f"{folder}: images and labels do not belong together")
    return (
        found[0].unsqueeze(1).float() / 255, found[1].long(),
        found[2].unsqueeze(1).float() / 255, found[3].long(),
    )  # fmt: skip


def _idx(folder: Path, name: str) -> Tensor:
    path = folder / name
    try:
        with path.open("rb") if path.is_file() else gzip.open(f"{path}.gz") as file:
            raw = file.read(1 << 30)
    except FileNotFoundError:
        raise UsageError(
            f"--data fashion-mnist:{folder}: holds no {name} or {name}.gz; give the folder with "
            "the four files of the data set"
        ) from None
    except (OSError, EOFError) as error:
        raise FormatError(f"{name}: damaged ({error})") from None
    rank = raw[3] if len(raw) >= 4 and raw[:3] == b"\0\0\x08" else 0
    if not 1 <= rank <= 3 or len(raw) < 4 + 4 * rank:
        raise FormatError(f"{name}: not an idx file of bytes")
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    size = 1
    for extent in shape:
        size *= extent
    if len(raw) - 4 - 4 * rank != size or size == 0:
        raise FormatError(f"{name}: its size does not match its header; truncated?")
    return torch.frombuffer(bytearray(raw[4 + 4 * rank :]), dtype=torch.uint8).reshape(shape)


def read_folder(folder: Path, seed: int, side: int = 32) -> Split:
    """Images in one subfolder for each class, resized to side x side RGB; a fifth is held out."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("pillow", "vision") from None
    classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    images, labels = [], []
    for label, place in enumerate(classes):
        for path in sorted(p for p in place.iterdir() if p.is_file() and p.name[0] != "."):
            try:
                with Image.open(path) as image:
                    small = image.convert("RGB").resize((side, side))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise FormatError(f"{path}: no image that can be read ({error})") from None
            raw = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
            images.append(raw.reshape(side, side, 3).permute(2, 0, 1))
            labels.append(label)
    if len(classes) < 2 or len(images) < 5:
        raise UsageError(
            f"--data images:{folder}: needs at least 2 subfolders, one for each class, and 5 images"
        )
    x, y = torch.stack(images).float() / 255, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = order[: max(1, len(y) // 5)]
    rest = order[len(held) :]
    return x[rest], y[rest], x[held], y[held]


IMAGES: dict[str, Callable[[Path, int], Split]] = {
    "digits": read_digits,
    "fashion-mnist": read_idx,
    "images": read_folder,
}
