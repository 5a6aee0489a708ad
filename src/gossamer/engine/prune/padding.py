"""Which of a batch's tokens are padding, and which rows of a layer's input they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gossamer.engine.data import Batch, real_tokens

_CROSS = re.compile(r"encoder_?attn|encdec|cross_?att|multihead_attn", re.IGNORECASE)
_FROM_ENCODER = re.compile(r"^(k|v|kv|key|value)(_?(proj|lin|weight))*$", re.IGNORECASE)
_SEEN = re.compile(r"vision|visual|image|pixel|audio", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Padding:
    """The real tokens of one batch, as bool masks (batch, tokens), where some are not real.

    encoder: of the whole model where it has no decoder beside an encoder. decoder: of that decoder,
    None where all of its tokens are real. decoder_length: of its inputs, where the batch tells.
    """

    encoder: Tensor | None
    decoder: Tensor | None = None
    decoder_length: int | None = None
    two_sided: bool = False
    text: bool = False

    def mask_of(self, name: str, shape: Iterable[int] = ()) -> Tensor | None:
        """The mask of a weight's inputs by its place in the model; None where all are real.

        In a decoder beside an encoder, cross attention's keys and values come from the encoder, and
        so does what has the encoder's length where that is another one.
        """
        parts = name.split(".")
        if self.text and any(_SEEN.search(part) for part in parts):
            return None
        side = next((part for part in parts if part in ("encoder", "decoder")), None)
        if not self.two_sided or side != "decoder":
            return self.encoder
        if any(map(_CROSS.search, parts)) and _FROM_ENCODER.match(parts[-1]):
            return self.encoder
        length = list(shape)[1:2]
        other = self.encoder is not None and length == [self.encoder.shape[1]]
        if other and self.decoder_length is not None and length != [self.decoder_length]:
            return self.encoder
        return self.decoder


def padding_of(batch: Batch, two_sided: bool) -> Padding | None:
    """The padding of a batch; None where every token is real.

    `attention_mask` and `decoder_attention_mask` are 1 where a token is real; the masks that torch
    calls `..._key_padding_mask` are True where it is not.
    """
    if not isinstance(batch, Mapping):
        return None
    encoder = real_tokens(batch)
    if encoder is None:
        encoder = _inverted(batch, "src_key_padding_mask", "key_padding_mask")
    decoder = real_tokens(batch, "decoder_attention_mask")
    if decoder is None:
        decoder = _inverted(batch, "tgt_key_padding_mask")
    if encoder is None and decoder is None:
        return None
    inputs = (batch.get(key) for key in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
    length = next((x.shape[1] for x in inputs if isinstance(x, Tensor) and x.dim() > 1), None)
    return Padding(encoder, decoder, length, two_sided, "input_ids" in batch)


def hides_padding(batch: Batch) -> bool:
    """Whether a batch has a mask of which no token's padding can be read."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)


def is_two_sided(modules: Iterable[str]) -> bool:
    """Whether a model, by the dotted names of its modules, has a decoder beside an encoder.

    An encoder of images before a language model with a `decoder` is not beside it.
    """
    names = set(modules)
    owners = (name.rpartition("decoder") for name in names if name.split(".")[-1] == "decoder")
    return any(f"{owner}encoder" in names for owner, _, _ in owners)


def real_rows(x: Tensor, mask: Tensor) -> Tensor | None:
    """The rows (count, width) of an input (..., width) that are real; None where shapes do not fit.

    Fits: (batch, tokens, ...), tokens flattened, (tokens, batch, ...), (batch, heads, tokens, ...),
    and one row for each element of the batch, which is no token.
    """
    mask = mask.to(x.device)
    batch, tokens = mask.shape
    if x.dim() >= 3 and x.shape[:2] == mask.shape:
        return x[mask].reshape(-1, x.shape[-1])
    if x.dim() == 2 and len(x) == mask.numel():
        return x[mask.reshape(-1)]
    if x.dim() == 2 and len(x) == batch:
        return x
    if x.dim() == 3 and x.shape[:2] == (tokens, batch):
        return x[mask.t()]
    if x.dim() == 4 and (x.shape[0], x.shape[2]) == (batch, tokens):
        return x.transpose(1, 2)[mask].reshape(-1, x.shape[-1])
    return None


def _inverted(batch: Mapping[str, Any], *names: str) -> Tensor | None:
    for name in names:
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            padded = mask.bool() if not mask.is_floating_point() else mask != 0
            return ~padded if bool(padded.any()) else None
    return None
