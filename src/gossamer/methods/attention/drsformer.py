"""DRSformer: attention between channels, each row with its largest logits only.

A map of channels by channels, computed from normalised queries and keys over all pixels. Several
softmaxes keep different shares of each row, and learned weights add them up.

**Paper.** Learning A Sparse Transformer Network for Effective Image Deraining, 2023.
https://arxiv.org/abs/2303.11950

**Claim.** The abstract gives no figure. It says that the network compares favourably with others on
Rain200H, Rain200L, DID, DDN and SPA. The claim was not tried here.

**Defaults.** Shares of 1/2, 2/3, 3/4 and 4/5, temperatures of 1, weights of 0.2 for each share and
no biases, as in the paper and its code.

**Notes.** The class is the attention layer. `MixedScaleFeedForward` in its module is the other half
of a block. The mixture-of-experts compensator of the paper's network is left out, as the paper does
for Rain200L and SPA. Maps are added before they meet the values; the release multiplies each map
with the values and adds then, which is the same to rounding. Nothing is faster here than with a
dense map, which has only channels by channels.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count, check_share
from gossamer.ops.select import keep

SHARES = (1 / 2, 2 / 3, 3 / 4, 4 / 5)


class DRSformer(nn.Module):
    """The mixture of top-k maps between channels, with its convolutions.

    Parameters
    ----------
    channels : int
        Of input and output.
    heads : int
        Groups of channels, each with a map of its own; divides `channels`.
    shares : tuple of float
        The share of each row that a map keeps, rounded down; one map for each.
    bias : bool
        Whether convolutions have biases.

    References
    ----------
    Learning A Sparse Transformer Network for Effective Image Deraining (2023).
    """

    card: ClassVar[Card] = Card(
        name="drsformer",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("unstructured",),
        year=2023,
        link="https://arxiv.org/abs/2303.11950",
        status="experimental",
    )

    def __init__(
        self, channels: int, heads: int = 1, shares: tuple[float, ...] = SHARES, bias: bool = False
    ) -> None:
        check_count("DRSformer", "channels", channels)
        check_count("DRSformer", "heads", heads)
        if channels % heads:
            raise UsageError(f"DRSformer: {channels} channels do not divide into {heads} heads")
        for share in shares:
            check_share("DRSformer", "a share", share)
        counts = [kept(share, channels // heads) for share in shares]
        if not counts or not min(counts):
            raise UsageError(
                f"DRSformer: shares {tuple(shares)} of {channels // heads} channels a head keep "
                "none; take fewer heads or larger shares"
            )
        super().__init__()
        self.channels, self.heads, self.counts = channels, heads, tuple(counts)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.local = nn.Conv2d(
            3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias
        )
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.weights = nn.Parameter(torch.full((len(counts),), 0.2))
        self.project = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise UsageError(
                f"DRSformer takes (batch, {self.channels}, height, width), not {tuple(x.shape)}"
            )
        query, key, value = self.parts(x)
        found = self.map(query, key) @ value
        projected: Tensor = self.project(found.flatten(1, 2).unflatten(-1, x.shape[2:]))
        return projected

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, channels of a head, pixels)."""
        query, key, value = self.local(self.qkv(x)).flatten(2).chunk(3, dim=1)
        heads = (self.heads, -1)
        return query.unflatten(1, heads), key.unflatten(1, heads), value.unflatten(1, heads)

    def map(self, query: Tensor, key: Tensor) -> Tensor:
        """The weighted sum of the top-k maps, (batch, heads, channels, channels)."""
        logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-1, -2)
        logits = logits * self.temperature
        total = torch.zeros_like(logits)
        for weight, count in zip(self.weights, self.counts, strict=True):
            chosen = keep(logits, TopK(count))
            total = total + weight * logits.masked_fill(~chosen, -torch.inf).softmax(-1)
        return total


class MixedScaleFeedForward(nn.Module):
    """Two depth-wise branches, 3x3 and 5x5, that exchange halves once.

    Parameters
    ----------
    channels : int
        Of input and output.
    expansion : float
        Of the hidden width; the paper's 2.66.
    """

    def __init__(self, channels: int, expansion: float = 2.66) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.expand = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.first = nn.ModuleList(_depthwise(2 * hidden, 2 * hidden, size) for size in (3, 5))
        self.second = nn.ModuleList(_depthwise(2 * hidden, hidden, size) for size in (3, 5))
        self.project = nn.Conv2d(2 * hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same."""
        wide = self.expand(x)
        halves = [branch(wide).relu().chunk(2, dim=1) for branch in self.first]
        mixed = [torch.cat(parts, dim=1) for parts in zip(*halves, strict=True)]
        found = [branch(part).relu() for branch, part in zip(self.second, mixed, strict=True)]
        projected: Tensor = self.project(torch.cat(found, dim=1))
        return projected


def kept(share: float, channels: int) -> int:
    """The share of so many channels, rounded down; 2/3 of 3 are 2 whatever the last bit says."""
    return math.floor(share * channels + 1e-9)


def _depthwise(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=outputs, bias=False)
