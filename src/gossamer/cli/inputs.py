"""What commands read: models, texts, densities; every refusal names the fix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.cli.hub import model_folder
from gossamer.core import text
from gossamer.core.errors import FormatError, MissingExtra, UsageError
from gossamer.engine.measure.tasks import Subject, is_causal, main_input, reads_text
from gossamer.engine.progress import track
from gossamer.io import load

BUNDLED, BUNDLED_TEXT = "testbed:lm", "testbed:text"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eval_bytes(subject: Subject) -> int:
    """How much held-out text to measure on unless the user says: 0 is all of it."""
    return 0 if subject.tokenizer is None else 40_000


def check_model(name: str, option: str = "--model") -> Path | None:
    """The folder of the model, fetched if it is one of the hub; None for the bundled model.

    Raises UsageError where there is no such model.
    """
    return None if name == BUNDLED else model_folder(name, option)


def read_model(
    name: str, dtype: str, large_batches: bool | None = None, option: str = "--model"
) -> Subject:
    """The model in the dtype, in eval mode, with its tokenizer if its folder has one.

    batches: see `io.load`.
    """
    folder = check_model(name, option)
    with quiet(), track(None, True, f"reading {name}"):
        if folder is None:
            from gossamer.testbed import language_model

            return Subject(language_model(DTYPES[dtype]), None)
        model = load(folder, dtype=DTYPES[dtype], large_batches=large_batches)
    if not reads_text(model):
        raise UsageError(
            f"{option} {name}: {type(model).__name__} reads {main_input(model)}, and the commands "
            "measure on text; prune it from Python, with gs.prune and batches of your own "
            "(docs/guide/own-model.md)"
        )
    return Subject(model, _tokenizer(folder, model, f"{option} {name}"), is_causal(model))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which are as they were afterwards."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(folder: Path, model: nn.Module, what: str) -> Any:
    if not any(folder.glob("*token*")) and not (folder / "vocab.json").exists():
        if getattr(model.config, "vocab_size", 0) == 256:
            return None
        raise UsageError(f"{what}: holds no tokenizer; put its tokenizer files there")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise FormatError(f"{what}: its tokenizer cannot be read ({why})") from None


def read_text(source: str, option: str, bundled: Callable[[], bytes]) -> bytes:
    """The bytes of a file, of all .txt, .md, .rst and .py files of a folder, or the bundled text."""
    if source == BUNDLED_TEXT:
        return bundled()
    try:
        return text.read_text(Path(source))
    except UsageError as error:
        raise UsageError(f"{option} {error}; or use {BUNDLED_TEXT}") from None


def density_of(sparsity: float | None, density: float | None) -> float | None:
    """The density that the flags ask for; raises UsageError outside the range or for both."""
    if sparsity is not None and density is not None:
        raise UsageError("give --sparsity or --density, not both")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UsageError(
            f"--sparsity is the fraction removed, in [0, 1), not {sparsity:g}; write 0.5 or 50%"
        )
    if density is not None and not 0 < density <= 1:
        raise UsageError(
            f"--density is the fraction kept, in (0, 1], not {density:g}; write 0.5 or 50%"
        )
    return density if sparsity is None else 1 - sparsity


def source_dtype(folder: Path | None) -> str:
    """The dtype of the weights in a folder's files, as safetensors names it; empty if unknown."""
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not files:
        return ""
    from safetensors import safe_open

    with safe_open(files[0], framework="pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return "float32" if "F32" in dtypes else ""
