"""What commands read: models, texts, densities; every refusal names the fix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import FormatError, MissingExtra, UsageError
from gossamer.engine.tasks import Subject, is_causal
from gossamer.io import load

BUNDLED, BUNDLED_TEXT = "testbed:lm", "testbed:text"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_model(name: str) -> None:
    """Raise UsageError unless `name` is the bundled model or a folder with config.json."""
    if name == BUNDLED:
        return
    folder = Path(name)
    if not folder.is_dir():
        raise UsageError(f"--model {name}: no such folder; give a Hugging Face folder or {BUNDLED}")
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {name}: holds no config.json, so it is not a model folder")


def read_model(name: str, dtype: str, batches: bool | None = None) -> Subject:
    """The model in the dtype, in eval mode, with its tokenizer if its folder has one.

    batches: see `io.load`.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    check_model(name)
    if name == BUNDLED:
        from gossamer.testbed import language_model

        with _no_bars():
            return Subject(language_model(DTYPES[dtype]), None)
    with _no_bars():
        model = load(name, dtype=DTYPES[dtype], batches=batches)
    kind = _kind(name, model)
    return Subject(model, _tokenizer(Path(name), model), kind == "causal")


def _kind(name: str, model: nn.Module) -> str:
    """`causal` or `encoder`; raises UsageError for what the commands cannot measure."""
    if is_causal(model):
        return "causal"
    text_only = getattr(model, "main_input_name", "") == "input_ids"
    if text_only and type(model).__name__.endswith("Model"):
        return "encoder"
    raise UsageError(
        f"--model {name}: {type(model).__name__} is neither a causal language model nor a plain "
        "text encoder; prune other models from Python with gs.prune"
    )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, as they were afterwards."""
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


def _tokenizer(folder: Path, model: nn.Module) -> Any:
    if not any(folder.glob("*token*")) and not (folder / "vocab.json").exists():
        if getattr(model.config, "vocab_size", 0) == 256:
            return None
        raise UsageError(f"--model {folder}: holds no tokenizer; put its tokenizer files there")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise FormatError(f"--model {folder}: its tokenizer cannot be read ({error})") from None


def read_text(source: str, option: str, bundled: Callable[[], bytes]) -> bytes:
    """The bytes of a file, of all .txt, .md, .rst and .py files of a folder, or the bundled text."""
    if source == BUNDLED_TEXT:
        return bundled()
    path = Path(source)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in (".txt", ".md", ".rst", ".py")]
        data = b"\n".join(p.read_bytes() for p in files)
    elif path.is_file():
        data = path.read_bytes()
    else:
        raise UsageError(f"{option} {source}: no such file or folder; or use {BUNDLED_TEXT}")
    if not data.strip():
        raise UsageError(f"{option} {source}: holds no text; give a file with text in it")
    return data


def density_of(sparsity: float | None, density: float | None) -> float | None:
    """The density that the flags ask for; raises UsageError outside the range or for both."""
    if sparsity is not None and density is not None:
        raise UsageError("give --sparsity or --density, not both")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UsageError(f"--sparsity is the fraction removed, in [0, 1), not {sparsity:g}")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"--density is the fraction kept, in (0, 1], not {density:g}")
    return density if sparsity is None else 1 - sparsity
