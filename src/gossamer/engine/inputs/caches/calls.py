"""Calls of a model's attention that a cache answers, and what their masks say."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.engine.inputs import masks


def real_tokens(mask: Tensor | None, batch: int, new: int, seen: int, layer: int) -> Tensor | None:
    """bool (batch, new): which new tokens are real; None where all are.

    The last query sees every real token up to itself, so its row of the mask tells.
    """
    if mask is None:
        return None
    if mask.dtype == torch.int32:
        row = masks.decode(mask, new, layer).real
    elif mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        last = mask[:, 0, -1]
        row = last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2
    else:
        raise UsageError(f"layer {layer} was given a mask {mask.dtype} {tuple(mask.shape)}")
    if row.shape[1] != seen + new:
        raise UsageError(
            f"layer {layer} was given a mask over {row.shape[1]} tokens, but the cache has seen "
            f"{seen} and {new} are new; attention_mask is (batch, all tokens so far)"
        )
    found = row[:, seen:].expand(batch, new)
    return None if bool(found.all()) else found
