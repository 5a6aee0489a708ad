"""Calibration data: batches of tensors or of named tensors, and how a model is called on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError

Batch: TypeAlias = Tensor | Mapping[str, Any]
"""One batch: the model is called as `model(batch)`, or as `model(**batch)` for a mapping."""


def read_batches(data: Iterable[Batch]) -> list[Batch]:
    """All batches as a list; raises UsageError when there are none or one has the wrong type."""
    if isinstance(data, (Tensor, Mapping, str, bytes)):
        raise UsageError(
            f"data is an iterable of batches, not one {type(data).__name__}: write [batch]"
        )
    batches = list(data)
    for index, batch in enumerate(batches):
        if not isinstance(batch, (Tensor, Mapping)):
            raise UsageError(
                f"calibration batch {index} is a {type(batch).__name__}; give tensors, called as "
                "model(batch), or dicts, called as model(**batch)"
            )
    if not any(tensor.numel() for batch in batches for tensor in _tensors(batch).values()):
        raise UsageError("the calibration data is empty; give at least one batch")
    return batches


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on one batch, moved to the device of its weights."""
    device = device_of(model)
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return model(**moved)


def rows_of(batch: Batch) -> int:
    """How many inputs a batch holds: the first dimension of its first tensor that has one."""
    sizes = (tensor.shape[0] for tensor in _tensors(batch).values() if tensor.dim())
    return next(sizes, 1)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def real_tokens(batch: Batch, name: str = "attention_mask") -> Tensor | None:
    """The (batch, tokens) bool mask of positions that are not padding; None where all are real."""
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.bool().all()):
        return None
    return mask.bool()


def digest_batches(batches: Iterable[Batch]) -> str:
    """A hash of every tensor in the batches, in order."""
    return digest(
        (f"{index}.{key}", tensor)
        for index, batch in enumerate(batches)
        for key, tensor in _tensors(batch).items()
    )


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named tensors: names, dtypes, shapes and bits."""
    total = blake2b(digest_size=16)
    for name, tensor in tensors:
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def digest_model(model: nn.Module) -> str:
    """A hash of every parameter and saved buffer of the model."""
    state = model.state_dict().items()
    return digest((name, value) for name, value in state if isinstance(value, Tensor))


def _tensors(batch: Batch) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"": batch}
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


def check_same_run(place: str, old: Mapping[str, Any], new: Mapping[str, Any], remedy: str) -> None:
    """Raise UsageError, naming what changed, unless a place's fingerprint is this run's."""
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if changed:
        changes = ", ".join(changed)
        raise UsageError(f"{place} belongs to another run: {changes} changed; {remedy}")
