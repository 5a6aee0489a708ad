"""A sparse cache as one safetensors file, bound to its model's config and its method.

Names are `layer.part.tensor`, where a part is the batch, or one text of a batch with padding. What
is no tensor stands as JSON in the metadata. Nothing is unpickled, and all is checked before the
cache changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.files import write_safetensors, write_whole
from gossamer.engine.inputs.caches.layer import SparseLayer
from gossamer.engine.inputs.caches.rows import Rows

FORMAT, VERSION = "gossamer-cache", 1
_FACTS = {"format", "version", "model", "method", "seen", "solid", "texts", "lengths"}


def save(
    path: str | os.PathLike[str], layers: Sequence[SparseLayer], model: str, method: Any
) -> None:
    """Write layers whose prompts are over; `model` is the config's digest."""
    if not layers or not layers[0].seen:
        raise UsageError("an empty cache is not saved: give it a text first")
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        for part, rows in enumerate(layer.stored):
            for name, tensor in rows.tensors().items():
                tensors[f"{index}.{part}.{name}"] = tensor.detach().cpu().contiguous()
    first = layers[0]
    facts = {
        "format": FORMAT, "version": VERSION, "model": model, "method": method_digest(method),
        "seen": first.seen, "solid": first.solid, "texts": first.texts,
        "lengths": [rows.length for rows in first.stored],
    }  # fmt: skip
    metadata = {"gossamer": json.dumps(facts)}
    write_whole(Path(path), lambda place: write_safetensors(tensors, place, metadata))


def restore(
    path: str | os.PathLike[str], layers: Sequence[SparseLayer], model: str, method: Any
) -> None:
    """Fill the layers of a new cache; raises FormatError, or UsageError for another model."""
    facts, tensors = _read(Path(path))
    if facts["model"] != model:
        raise UsageError(f"{path} is a cache of another model: the configs differ")
    if facts["method"] != method_digest(method):
        raise UsageError(f"{path} was made by another method or other options than {method!r}")
    lengths, texts = facts["lengths"], facts["texts"]
    found = []
    for index, layer in enumerate(layers):
        each = texts if len(lengths) == 1 else 1
        parts = [
            _part(layer, tensors, f"{index}.{part}.", each, n) for part, n in enumerate(lengths)
        ]
        found.append(parts)
    if tensors:
        raise FormatError(f"{path} holds tensors that no layer has: {min(tensors)}")
    for layer, parts in zip(layers, found, strict=True):
        layer.restored(parts, facts["seen"], facts["solid"], texts)


def method_digest(method: Any) -> str:
    """Of a method's options, and of the tensors that it learned."""
    digest = hashlib.sha256(repr(method).encode())
    for field in fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Mapping):
            for key in sorted(value):
                if isinstance(value[key], Tensor):
                    digest.update(f"{key}{value[key].tolist()}".encode())
    return digest.hexdigest()


def _part(
    layer: SparseLayer, tensors: dict[str, Tensor], prefix: str, texts: int, length: int
) -> Rows:
    own = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
    try:
        rows = layer.keeper.restore(own, texts, length)
    except KeyError as error:
        raise FormatError(f"a cache's part {prefix} has no tensor {error}") from None
    return rows


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FormatError(f"{path} is no file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("gossamer", "")
            facts = json.loads(text)
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} is no cache: {line}") from None
    _check_facts(path, facts)
    return facts, tensors


def _check_facts(path: Path, facts: Any) -> None:
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise FormatError(f"{path} is no cache")
    if facts.get("version") != VERSION:
        raise FormatError(f"{path} is a cache of version {facts.get('version')!r}, not {VERSION}")
    lengths = facts.get("lengths")
    lengths = lengths if isinstance(lengths, list) and lengths else [None]
    counts = [facts.get("seen"), facts.get("solid"), facts.get("texts"), *lengths]
    right = set(facts) == _FACTS and all(type(x) is int and 0 <= x < 2**31 for x in counts)
    if not right or len(lengths) not in (1, facts["texts"]) or facts["seen"] < max(lengths):
        raise FormatError(f"{path}: its counts contradict each other")
