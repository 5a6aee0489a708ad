"""BiFormer: pixels attend the regions of an image that their own region is routed to.

The map is cut into regions, and each takes the few regions whose mean keys fit its mean query. Every
pixel then attends all pixels of those regions, head by head.

**Paper.** BiFormer: Vision Transformer with Bi-Level Routing Attention, 2023.
https://arxiv.org/abs/2303.08810

**Claim.** BiFormer-S reaches 83.8% on ImageNet-1K with 4.5 GFLOPs. The claim was not tried here.

**Defaults.** 7 by 7 regions, 4 routes, a depth-wise 5x5 convolution of the values beside the
attention, and products scaled by the whole width, as in the paper's code.

**Notes.** The class is the attention layer. Routes are chosen from detached means over all heads
together, and no loss teaches them. Sides that the regions do not divide are padded; padded pixels
are in no mean and no softmax, where the release lets them into both. A mean hides a single hot
pixel, which is the method's weakness and not mended here. The regions are read where they are. The
release gathers keys and values first, which copies them once for each route.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count
from gossamer.ops.attention import Layout, attention
from gossamer.ops.select import keep


class BiFormer(nn.Module):
    """Attention of pixels to the pixels of routed regions, with local enhancement.

    Parameters
    ----------
    channels : int
        Of input and output.
    heads : int
        Of the attention; divides `channels`.
    regions : int
        Per side of the map.
    routes : int
        Regions that each region attends; all of them where there are no more.
    local : int
        Side of the depth-wise convolution of the values; odd.
    bias : bool
        Of the projection to queries, keys and values.

    References
    ----------
    BiFormer: Vision Transformer with Bi-Level Routing Attention (2023).
    """

    card: ClassVar[Card] = Card(
        name="biformer",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("block",),
        year=2023,
        link="https://arxiv.org/abs/2303.08810",
        status="experimental",
    )

    def __init__(
        self, channels: int, heads: int = 8, regions: int = 7, routes: int = 4, local: int = 5,
        bias: bool = True,
    ) -> None:  # fmt: skip
        given = {"channels": channels, "heads": heads, "regions": regions, "routes": routes}
        for name, value in (given | {"local": local}).items():
            check_count("BiFormer", name, value)
        if channels % heads:
            raise UsageError(f"BiFormer: {channels} channels do not divide into {heads} heads")
        if local % 2 == 0:
            raise UsageError(f"BiFormer: local is odd, not {local}")
        super().__init__()
        self.channels, self.heads = channels, heads
        self.regions, self.routes = regions, routes
        self.scale = channels**-0.5
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.local = nn.Conv2d(channels, channels, local, padding=local // 2, groups=channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same."""
        if x.dim() != 4 or x.shape[1] != self.channels or not x.shape[2] * x.shape[3]:
            raise UsageError(
                f"BiFormer takes (batch, {self.channels}, height, width), not {tuple(x.shape)}"
            )
        maps = self.qkv(x).chunk(3, dim=1)
        real = cut(torch.ones_like(x[:1, :1]), self.regions)[0, 0] > 0
        query, key, value = (cut(part, self.regions) for part in maps)
        routes = self.choose(query, key, real)
        size, count = real.shape[1], real.numel()
        layout = Layout.from_blocks(routes.unsqueeze(1), count, count, size, size)
        query, key, value = (self._heads(part) for part in (query, key, value))
        padding = None if bool(real.all()) else self._bias(real, x)
        output, _ = attention(query, key, value, layout, scale=self.scale, key_bias=padding)
        seen = joined(output.transpose(-1, -2).flatten(1, 2), self.regions, x.shape[2:])
        projected: Tensor = self.project(seen + self.local(maps[2]))
        return projected

    def choose(self, query: Tensor, key: Tensor, real: Tensor) -> Tensor:
        """bool (batch, regions, regions): which regions each one attends.

        query, key: as `cut` gives them; real: bool (regions, pixels), False for padding.
        """
        count = real.sum(1).clamp(min=1)
        means = [(part.detach() * real).sum(-1) / count for part in (query, key)]
        scores = means[0].transpose(1, 2) @ means[1]
        return keep(scores.masked_fill(~real.any(1), -torch.inf), TopK(self.routes))

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, heads, pixels, width), region after region."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(-1, -2)

    def _bias(self, real: Tensor, like: Tensor) -> Tensor:
        """0 for pixels and minus infinity for padding, (1, 1, pixels)."""
        zero = torch.zeros(1, 1, real.numel(), dtype=like.dtype, device=like.device)
        return zero.masked_fill(~real.flatten(), -torch.inf)


def cut(x: Tensor, regions: int) -> Tensor:
    """(batch, channels, height, width) as (batch, channels, regions ** 2, pixels), padded by 0."""
    height, width = x.shape[2:]
    padded = F.pad(x, (0, -width % regions, 0, -height % regions))
    blocks = padded.unflatten(3, (regions, -1)).unflatten(2, (regions, -1))
    return blocks.transpose(3, 4).flatten(4).flatten(2, 3)


def joined(x: Tensor, regions: int, size: torch.Size) -> Tensor:
    """The inverse: (batch, channels, regions ** 2 * pixels) to (batch, channels, height, width)."""
    rows, columns = (-(-side // regions) for side in size)
    blocks = x.unflatten(2, (regions, regions, rows, columns)).transpose(3, 4)
    return blocks.flatten(4).flatten(2, 3)[..., : size[0], : size[1]]
