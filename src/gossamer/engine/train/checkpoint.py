"""Nested training state in one safetensors file, written whole or not at all; never pickle.

Tensors lie under running numbers; the structure around them is JSON in the file's metadata, with
dictionaries as lists of pairs, so that the whole numbers that optimizers use as keys stay numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.files import write_safetensors, write_whole

FORMAT = "gossamer-training-1"
_DEPTH = 32


def write_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, numbers, texts and tensors; what `path` held stays until then.

    Raises UsageError for a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, tensors))
    metadata = {"format": FORMAT, "structure": structure}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), lambda place: write_safetensors(tensors, place, metadata))


def read_state(path: str | Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU. Raises FormatError for anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError(f"not of the format {FORMAT}")
        state = _decode(json.loads(metadata["structure"]), tensors, _DEPTH)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: no training state that can be read ({error})") from None
    if not isinstance(state, dict):
        raise FormatError(f"{path}: its training state is not a dictionary")
    return state


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise UsageError(f"training state: the key {key!r} is neither text nor a number")
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return {"list": [_encode(item, tensors) for item in value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UsageError(f"training state: {type(value).__name__} cannot be written; give numbers, "
                     "texts, tensors, or dicts and lists of them")  # fmt: skip


def _decode(value: Any, tensors: Mapping[str, Tensor], depth: int) -> Any:
    if depth == 0:
        raise ValueError("nested too deeply")
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list without a name")
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "list":
        return [_decode(item, tensors, depth - 1) for item in inner]
    if kind != "dict" or not all(type(key) in (str, int) for key, _ in inner):
        raise ValueError(f"an unknown kind of value, {kind!r}")
    return {key: _decode(item, tensors, depth - 1) for key, item in inner}


def random_state() -> dict[str, Tensor]:
    """The state of torch's own generators: the CPU's, and the current device's where there is one."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Continue torch's own generators from `random_state()`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
