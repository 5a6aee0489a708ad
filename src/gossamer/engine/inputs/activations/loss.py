"""The loss of calibration data, where a model is one of language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.engine.data import Batch, call, real_tokens
from gossamer.engine.hooks import evaluating

MOST = 4
"""Batches that are read for it."""


def loss_of(model: nn.Module, batches: Sequence[Batch]) -> float | None:
    """Nats per token over the first batches; None for models without logits of next tokens."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches[:MOST]:
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
            if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
                return None
            output: Any = call(model, batch)
            logits = getattr(output, "logits", None)
            if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
                return None
            mask = real_tokens(batch)
            wanted = ids[:, 1:].to(logits.device)
            if mask is not None:
                wanted = wanted.masked_fill(~mask[:, 1:].to(logits.device), -100)
            nats = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="sum"
            )
            total, count = total + float(nats), count + int((wanted >= 0).sum())
    return total / count if count else None
