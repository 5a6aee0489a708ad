"""From what `--model` names to a folder: a folder as it is, or a model of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gossamer.core.errors import FormatError, MissingExtra, UsageError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "merges.txt",
    "vocab.txt",
    "*.model",
]
"""What is fetched: weights without pickles, config, tokenizer; code never."""
_NOT = ["*/*", "*.onnx.json"]


def model_folder(name: str, option: str = "--model") -> Path:
    """The folder of a model: `name` itself, or the copy in the local cache of the hub's `org/name`.

    The cache is asked first, then the hub, unless HF_HUB_OFFLINE is set. Raises UsageError where
    there is no such model, or its folder holds no config.json or no safetensors.
    """
    place = Path(name)
    if place.is_dir():
        return _checked(place, f"{option} {name}")
    if place.exists():
        raise UsageError(f"{option} {name}: is a file; give the folder of the model")
    if not _ID.fullmatch(name):
        raise UsageError(f"{option} {name}: no such folder; give a Hugging Face folder, a name such as "
                         "HuggingFaceTB/SmolLM2-135M, or testbed:lm")  # fmt: skip
    return _checked(_snapshot(name, option), f"{option} {name}")


def _snapshot(name: str, option: str) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants
    except ImportError:
        raise MissingExtra("huggingface_hub", "hf") from None
    cached: Any = None
    try:
        cached = Path(hub.snapshot_download(name, local_files_only=True))
    except Exception:  # nothing of it is in the cache, or the cache is damaged
        cached = None
    if cached is not None and any(cached.glob("*.safetensors")):
        return cached
    where = f"{option} {name}: no such folder, and not in the local cache of Hugging Face"
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{where}; HF_HUB_OFFLINE is set, so the hub is not asked")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_NOT))
    except Exception as error:
        why = " ".join(str(error).split())[:160]
        raise UsageError(
            f"{where}; the hub did not give it ({type(error).__name__}: {why})"
        ) from None


def _checked(folder: Path, what: str) -> Path:
    """The folder, if it looks like one of a model."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{what}: holds no config.json, so it is not a model folder")
    if any(folder.glob("*.safetensors")):
        return folder
    others = sorted(p.name for e in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(e))
    if others:
        raise UsageError(
            f"{what}: holds {others[0]} but no safetensors; Gossamer reads no pickles: load it with "
            "transformers and save it with save_pretrained"
        )
    raise FormatError(f"{what}: holds no weights (*.safetensors)")
