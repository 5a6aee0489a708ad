"""Double Sparsity: each new token reads the keys that a few channels say matter.

Calibration finds, for each head of keys, the channels in which queries and keys multiply to most.
The cache is kept whole, beside a short label of each key: those channels alone, in 4 bits. A query
is multiplied with the labels, and the keys with the highest products are read.

**Paper.** Post-Training Sparse Attention with Double Sparsity, 2024.
https://arxiv.org/abs/2408.07092

**Claim.** A sixteenth of the channels and of the keys is enough: up to 14.1 times faster attention
and 1.9 times faster decoding.

**Defaults.** A quarter of the channels and 128 keys, as in the paper's scripts; labels of 4 bits;
the first two layers dense.

**Notes.** Calibrate first: `method = gs.calibrate_attention(model, gs.attention.DoubleSparsity(),
data)`. The statistic is the mean of |q k| for each channel, of the same token and after rotation,
over all tokens of all prompts; the release keeps the last prompt's only. Query heads that share a
head of keys share its labels and what is read: channels by their mean statistic, keys by the sum of
their estimated attention, which is a softmax over the labels' products. With one query head for each
head of keys this is the paper's order. 4-bit labels have one scale and one least value for each key.
The newest key is always read, within the budget. `tokens` is a budget of the layers that choose, and
dense layers are outside; with `density` they are inside, and the others read less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.budgets import (
    budget_of,
    check_budget,
    check_dense,
    share_beside_dense,
)
from gossamer.methods.attention.tiles import check_causal, check_count


@dataclass(frozen=True)
class DoubleSparsity:
    """The keys with the highest products in a few calibrated channels.

    Parameters
    ----------
    tokens : int
        Keys that one token reads for each head, in layers that are not dense.
    density : float or None
        Instead of `tokens`: their share of the text, over all layers, in (0, 1].
    factor : int
        One channel in so many is in a label.
    bits : int
        4, or 16: labels of the keys' own dtype.
    dense : int
        First layers that read everything.
    channels : mapping of int to Tensor
        By layer, int64 (kv_heads, channels); `gossamer.calibrate_attention` makes them.

    References
    ----------
    Post-Training Sparse Attention with Double Sparsity (2024).
    """

    tokens: int = 128
    density: float | None = None
    factor: int = 4
    bits: int = 4
    dense: int = 2
    channels: Mapping[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    card: ClassVar[Card] = Card(
        name="doublesparsity",
        topic="attention",
        role="cache",
        needs=(),
        patterns=("unstructured",),
        year=2024,
        link="https://arxiv.org/abs/2408.07092",
        status="experimental",
    )
    page: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_count("DoubleSparsity", "factor", self.factor)
        check_count("DoubleSparsity", "dense", self.dense, 0)
        if self.bits not in (4, 16):
            raise UsageError(f"DoubleSparsity: bits is 4 or 16, not {self.bits!r}")
        check_budget("DoubleSparsity", self.tokens, self.density, 1, "one key")

    def observe(self, call: AttentionCall) -> dict[str, Any]:
        """|q k| of each channel, summed over tokens: float64 (heads, width), and their number."""
        check_causal("DoubleSparsity", call)
        key = call.key[:, :, call.past :].repeat_interleave(call.shared, dim=1)
        return {
            "sums": (call.query.double() * key.double()).abs().sum((0, 2)),
            "tokens": call.query.shape[0] * call.queries,
            "kv_heads": call.key.shape[1],
        }

    def fitted(self, observed: Mapping[int, Sequence[dict[str, Any]]]) -> DoubleSparsity:
        """The same method with the channels of each layer."""
        found = {}
        for layer, seen in observed.items():
            mean = statistic(seen).unflatten(0, (seen[0]["kv_heads"], -1)).mean(1)
            count = mean.shape[-1] // self.factor
            if count < 1 or (self.bits == 4 and count % 2):
                raise UsageError(
                    f"DoubleSparsity: factor={self.factor} makes labels of {count} of "
                    f"{mean.shape[-1]} channels; 4-bit labels need an even number of them"
                )
            order = mean.argsort(dim=-1, descending=True, stable=True)
            found[layer] = order[:, :count].sort(dim=-1).values
        return replace(self, channels=found)

    def check_model(self, heads: int, kv_heads: int, width: int, layers: int) -> None:
        """Refuse a model without channels, or of other heads."""
        check_dense("DoubleSparsity", self.density, self.dense, layers)
        for layer in range(self.dense, layers):
            channels = self.channels.get(layer)
            if channels is None:
                raise UsageError(
                    f"DoubleSparsity has no channels for layer {layer}; make them with "
                    "gs.calibrate_attention(model, method, data)"
                )
            if channels.shape[0] != kv_heads or int(channels.max()) >= width:
                raise UsageError(
                    f"the channels of layer {layer} are for {channels.shape[0]} heads of keys, and "
                    f"this model has {kv_heads} of width {width}: calibrated on another model"
                )

    def keys_read(self, length: int, layer: int, layers: int) -> int:
        """All in dense layers."""
        if layer < self.dense:
            return length
        share = self.density
        if share is not None:
            share = share_beside_dense(share, self.dense, layers)
        return budget_of(self.tokens, share, length, 1)

    def summarise(self, pages: Tensor, layer: int) -> dict[str, Tensor]:
        """The labels of keys (texts, kv_heads, keys, ...); none in dense layers."""
        if layer < self.dense:
            return {}
        key = pages.squeeze(3)
        channels = self.channels[layer].to(key.device)[:, None].expand(*key.shape[:3], -1)
        label = key.gather(3, channels)
        return {"label": label} if self.bits == 16 else packed(label)

    def score(self, query: Tensor, summary: Mapping[str, Tensor], layer: int) -> Tensor:
        """Estimated attention, summed over the group: float32 (texts, kv_heads, keys)."""
        channels = self.channels[layer].to(query.device)
        group = query.squeeze(2).unflatten(1, (channels.shape[0], -1)).float()
        group = group.gather(3, channels[:, None].expand(*group.shape[:3], -1))
        group = group * channels.shape[1] ** -0.5
        if self.bits == 16:
            products = group @ summary["label"].float().transpose(2, 3)
        else:
            products = unpacked_products(group, summary)
        return products.softmax(-1).sum(2)


def statistic(observed: Sequence[Mapping[str, Any]]) -> Tensor:
    """The mean of |q k| over all tokens observed, float64 (heads, width)."""
    sums = torch.stack([seen["sums"] for seen in observed])
    return sums.sum(0) / sum(seen["tokens"] for seen in observed)


def packed(label: Tensor) -> dict[str, Tensor]:
    """4-bit codes (.., channels / 2) of uint8, and scale and least value (.., 2) of float16.

    The first half of the channels lies in the lower bits.
    """
    label = label.float()
    least = label.amin(-1, keepdim=True)
    scale = (label.amax(-1, keepdim=True) - least) / 15
    codes = ((label - least) / scale.clamp(min=1e-12)).round().clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    limit = torch.finfo(torch.float16).max
    range_ = torch.cat([scale, least], dim=-1).clamp(-limit, limit).to(torch.float16)
    return {"codes": low | (high << 4), "range": range_}


def unpacked_products(query: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
    """query (texts, kv_heads, group, channels) times labels: (texts, kv_heads, group, keys)."""
    codes = summary["codes"]
    scale, least = summary["range"].float().unsqueeze(2).unbind(-1)
    low, high = query.chunk(2, dim=-1)
    found = low @ (codes & 15).float().transpose(2, 3)
    found = found + high @ (codes >> 4).float().transpose(2, 3)
    return found * scale + query.sum(-1, keepdim=True) * least
