"""Labelled images from files: (training images, labels, held-out images, labels).

Images are float32 (n, channels, height, width) in [0, 1], labels int64 (n,).
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, MissingExtra, UsageError

Split: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
LARGEST = 1 << 30
"""Bytes of an idx file that are read at most."""


def read_idx(folder: Path) -> Split:
    """The four files of (Fashion-)MNIST, plain or gzipped, as distributed.

    Raises UsageError for a missing file, FormatError for a damaged one.
    """
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
            raw = file.read(LARGEST)
    except FileNotFoundError:
        raise UsageError(
            f"{folder}: holds no {name} or {name}.gz; give the folder with the four files of the "
            "data set"
        ) from None
    except (OSError, EOFError) as error:
        raise FormatError(f"{name}: damaged ({error})") from None
    rank = raw[3] if len(raw) >= 4 and raw[:3] == b"\0\0\x08" else 0
    if not 1 <= rank <= 3 or len(raw) < 4 + 4 * rank:
        raise FormatError(f"{name}: not an idx file of bytes")
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    if len(raw) - 4 - 4 * rank != math.prod(shape) or math.prod(shape) == 0:
        raise FormatError(f"{name}: its size does not match its header; truncated?")
    return torch.frombuffer(bytearray(raw[4 + 4 * rank :]), dtype=torch.uint8).reshape(shape)


def read_folder(folder: Path, seed: int = 0, side: int = 32) -> Split:
    """Images in one subfolder for each class, resized to side x side RGB.

    The seed says which fifth is held out. Raises UsageError where there are too few, FormatError
    for a file that is no image, MissingExtra without pillow.
    """
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
        raise UsageError(f"{folder}: needs at least 2 subfolders, one for each class, and 5 images")
    x, y = torch.stack(images).float() / 255, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = order[: max(1, len(y) // 5)]
    rest = order[len(held) :]
    return x[rest], y[rest], x[held], y[held]
