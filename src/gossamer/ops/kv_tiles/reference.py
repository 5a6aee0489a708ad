"""The plain reference, in torch: any device and floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

TILE, STEP = 64, 8


def tile_count(width: int, keys: bool) -> int:
    """Tiles of 64 tokens: one for each channel of keys, one for every 64 channels of values."""
    return width if keys else TILE * -(-width // TILE)


def tiled(x: Tensor, keys: bool) -> Tensor:
    """(batch, heads, tokens, width) as (batch, heads, blocks, tiles, 64), zero past the width."""
    x = x.unflatten(2, (x.shape[2] // TILE, TILE))
    if keys:
        return x.transpose(3, 4)
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE))
    return x.unflatten(-1, (-1, TILE)).transpose(3, 4).flatten(3, 4)


def untiled(tiles: Tensor, width: int, keys: bool) -> Tensor:
    """The inverse."""
    if keys:
        return tiles.transpose(3, 4).flatten(2, 3)
    x = tiles.unflatten(3, (-1, TILE)).transpose(3, 4).flatten(4, 5)
    return x[..., :width].flatten(2, 3)


def marked(bitmaps: Tensor) -> Tensor:
    """bool (..., 64): the bits, lowest first."""
    return (bitmaps.unsqueeze(-1) >> torch.arange(TILE, device=bitmaps.device) & 1).bool()


def offsets(bitmaps: Tensor) -> tuple[Tensor, int]:
    """int32, where each tile's entries begin in steps of 8; and how many entries there are."""
    steps = (marked(bitmaps).sum(-1) + STEP - 1) // STEP
    ends = steps.flatten().cumsum(0)
    count = int(ends[-1]) if ends.numel() else 0
    return (ends.reshape(steps.shape) - steps).to(torch.int32), STEP * count


def pack(x: Tensor, mask: Tensor, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Bitmaps, offsets and entries."""
    kept = tiled(mask, keys)
    bitmaps = (kept.long() << torch.arange(TILE, device=x.device)).sum(-1)
    begin, count = offsets(bitmaps)
    entries = x.new_zeros(count)
    entries[_places(kept, begin)] = tiled(x, keys)[kept]
    return bitmaps, begin, entries


def unpack(bitmaps: Tensor, begin: Tensor, entries: Tensor, width: int, keys: bool) -> Tensor:
    """(batch, heads, tokens, width), zeros where nothing is kept."""
    kept = marked(bitmaps)
    tiles = entries.new_zeros(kept.shape)
    tiles[kept] = entries[_places(kept, begin)]
    return untiled(tiles, width, keys).contiguous()


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: list[Tensor],
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(output, lse) over the tiles' tokens, then the dense ones, in one softmax."""
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    widths = (key.shape[3], value.shape[3])
    tiles = [(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]
    both = [
        torch.cat([*(unpack(*one, width, keys) for one in own), dense], dim=2).to(sums)
        for own, width, keys, dense in (
            (tiles[::2], widths[0], True, key), (tiles[1::2], widths[1], False, value)
        )
    ]  # fmt: skip
    logits = _grouped(query.to(sums), both[0]) @ both[0].unsqueeze(2).transpose(-1, -2) * scale
    logits = logits.flatten(1, 2)
    left = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    if key_bias is not None:
        own = key_bias.to(sums).repeat_interleave(query.shape[1] // key_bias.shape[1], dim=1)
        left |= (own == -torch.inf).unsqueeze(2)
        logits = logits + own.unsqueeze(2)
    if causal:
        ahead = torch.arange(logits.shape[3]) - torch.arange(query.shape[2]).unsqueeze(1)
        left |= (ahead > logits.shape[3] - query.shape[2]).to(left.device)
    logits = logits.masked_fill(left, -torch.inf)
    highest = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(())
    weights = torch.exp(logits - torch.where(highest == -torch.inf, 0.0, highest))
    total = weights.sum(-1, keepdim=True)
    shares = _grouped(weights / torch.where(total == 0, 1.0, total), both[1])
    unread = _grouped(left.all(2, keepdim=True), both[1]).all(2).transpose(2, 3)
    output = (shares @ both[1].masked_fill(unread, 0.0).unsqueeze(2)).flatten(1, 2)
    lse = torch.log(total) + torch.where(highest == -torch.inf, 0.0, highest)
    return output.to(query.dtype), lse.squeeze(-1)


def _places(kept: Tensor, begin: Tensor) -> Tensor:
    """int64 (n,): where each kept entry lies."""
    rank = kept.cumsum(-1) - 1
    return (STEP * begin.long().unsqueeze(-1) + rank)[kept]


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """(batch, heads, ...) as (batch, heads of keys, heads of each, ...)."""
    return x.unflatten(1, (like.shape[1], -1))
