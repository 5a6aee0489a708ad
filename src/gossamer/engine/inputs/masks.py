"""Masks of transformers as one number a key, so that nothing of size queries * keys is made.

A model asks its mask function once and hands the answer to every layer. Ours answers with int32
(batch, 1, 1, keys): how far each key lies from the first query. Layers read causality, padding and
empty places of a static cache from it, and need not guess them from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import UsageError

PADDING = 2**30
"""Stands for a key that no query sees."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a mask says: whether it is causal, where the real keys end, and which they are."""

    causal: bool
    keys: int
    real: Tensor
    """bool (batch, keys)."""


def encode(arguments: dict[str, Any]) -> Tensor:
    """The mask that transformers' mask function is asked for.

    Raises UsageError for masks that are neither causal nor open to both sides, such as those of
    packed sequences.
    """
    from transformers import masking_utils

    function = arguments["mask_function"]
    causal = function is masking_utils.causal_mask_function
    if not causal and function is not masking_utils.bidirectional_mask_function:
        raise UsageError(
            "gs.sparse_attention serves causal attention and attention to both sides, with "
            "padding; the model asks for another mask, as for packed sequences, sliding windows "
            "or blocks of images: run it outside of the block"
        )
    if _number(arguments["kv_offset"]):
        raise UsageError("gs.sparse_attention needs a cache that holds all keys from the first")
    device, keys = arguments["device"], arguments["kv_length"]
    place = torch.arange(keys, dtype=torch.int32, device=device)
    places = place - arguments["q_offset"] if causal else torch.full_like(place, -PADDING)
    places = places.to(torch.int32).expand(arguments["batch_size"], keys)
    if (padding := arguments["attention_mask"]) is not None:
        real = torch.nn.functional.pad(padding.bool(), (0, max(0, keys - padding.shape[-1])))
        places = places.masked_fill(~real[:, :keys], PADDING)
    return places[:, None, None, :].contiguous()


def decode(mask: Tensor, queries: int, layer: int) -> Seen:
    """The inverse of `encode`; raises UsageError for a mask that is not from there."""
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        raise UsageError(
            f"layer {layer} was given a mask of its own ({mask.dtype} {tuple(mask.shape)}); "
            "gs.sparse_attention reads attention_mask of shape (batch, tokens) only"
        )
    places = mask[:, 0, 0]
    known = places[places != PADDING]
    keys = places.shape[1]
    if not known.numel():
        return Seen(False, keys, torch.zeros_like(places, dtype=torch.bool))
    causal = int(known[0]) != -PADDING
    if causal:
        column = torch.arange(keys, dtype=torch.int32, device=mask.device).expand_as(places)
        offset = int((column - places)[places != PADDING][0])
        keys = offset + queries
    return Seen(causal, keys, places[:, :keys] < queries)


def _number(value: Any) -> int:
    return int(value) if value is not None else 0
