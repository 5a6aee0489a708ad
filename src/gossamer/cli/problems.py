"""What `gossamer train` trains: the problem that `--data` and `--model` name together."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gossamer.cli.inputs import BUNDLED, BUNDLED_TEXT, check_model, read_model, read_text
from gossamer.core.errors import UsageError
from gossamer.engine.measure.problems import ImageProblem, TextProblem
from gossamer.io.images import Split, read_folder, read_idx
from gossamer.testbed import calibration_text, digits, heldout_text
from gossamer.testbed.base import Problem
from gossamer.testbed.language import Text
from gossamer.testbed.networks import cnn, mlp

NETWORKS = ("cnn", "mlp")
"""For images."""
SMALL = "llama"
"""For text: a small byte-level Llama from random weights."""
IMAGES = ("digits", "fashion-mnist", "images")


def read_problem(
    data: str, model: str, *, scratch: bool, width: int, batch: int, length: int, seed: int
) -> Problem:
    """The problem; raises UsageError where data and model do not fit."""
    if batch < 1 or length < 2 or width < 0:
        raise UsageError("--batch is at least 1, --length at least 2, --width at least 0")
    kind, _, place = data.partition(":")
    if kind in IMAGES:
        return _images(data, model, width, batch, _split(kind, place, seed, model, data))
    if data != BUNDLED_TEXT and not Path(data).exists():
        raise UsageError(
            f"--data {data}: choose digits, fashion-mnist:FOLDER, images:FOLDER, {BUNDLED_TEXT}, or "
            "a text file or folder that exists"
        )
    if model in NETWORKS:
        raise UsageError(
            f"--data {data} is text: choose --model {SMALL}, {BUNDLED} or a Hugging Face folder; a "
            "folder of images is --data images:FOLDER"
        )
    if model == SMALL and data == BUNDLED_TEXT:
        return _tiny(width, length, batch)
    return _text(data, model, scratch, width, batch, length)


def _split(kind: str, place: str, seed: int, model: str, data: str) -> Split:
    if model not in NETWORKS:
        raise UsageError(f"--data {data} is images: choose --model cnn or mlp, not {model!r}")
    if kind == "digits":
        return digits(seed=seed)
    try:
        return read_idx(Path(place)) if kind == "fashion-mnist" else read_folder(Path(place), seed)
    except UsageError as error:
        raise UsageError(f"--data {kind}:{error}") from None


def _images(data: str, model: str, width: int, batch: int, split: Split) -> ImageProblem:
    images, labels = split[0], split[1]
    if batch > len(labels):
        raise UsageError(f"--batch is at most the {len(labels)} training images")
    classes = int(labels.max()) + 1
    if model == "mlp":
        network = partial(mlp, images.shape[1:], classes, width or 256)
    else:
        network = partial(cnn, images.shape[1], classes, width or 8)
    return ImageProblem(*split, network, batch, data)


def _text(data: str, model: str, scratch: bool, width: int, batch: int, length: int) -> TextProblem:
    if model != SMALL:
        check_model(model)
    text = read_text(data, "--data", calibration_text)
    if data == BUNDLED_TEXT:
        train, held_out = text, heldout_text()
    else:
        cut = max(1, len(text) * 9 // 10)
        train, held_out = text[:cut], text[cut:]
    if model == SMALL:
        network, tokenizer = _tiny(width, length, batch).build(0), None
    else:
        subject = read_model(model, "float32")
        network, tokenizer = subject.model, subject.tokenizer
    return TextProblem(
        network, train, held_out, tokenizer, scratch or model == SMALL, batch, length,
        progress=True, name=data,
    )  # fmt: skip


def _tiny(width: int, length: int, batch: int) -> Text:
    """The testbed's problem, whose Llama serves for other text as well."""
    wide = width or Text.width
    return Text(wide, 11 * wide // 4, context=length, batch_size=batch)
