"""Orders of tokens, and layouts with masks inside tiles, which methods for diffusion models share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.core.denoising import TokenGrid
from gossamer.ops.attention import Layout, bits


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of (batch, heads, tokens, ...) by int64 (tokens,), or (batch, heads, tokens)."""
    if order.dim() == 1:
        return x[:, :, order]
    index = order.reshape(*order.shape, *([1] * (x.dim() - 3)))
    return x.gather(2, index.expand(*order.shape, *x.shape[3:]))


def restored(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `reordered`."""
    return reordered(x, order.argsort(dim=-1))


def space_filling(grid: TokenGrid) -> Tensor:
    """int64 (tokens,): the video along a Hilbert curve through frames, rows and columns; text where
    it is."""
    axes = [torch.arange(n) for n in (grid.frames, grid.height, grid.width)]
    place = torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")], dim=1)
    most = max(grid.frames, grid.height, grid.width)
    order = hilbert(place, max(1, math.ceil(math.log2(most)))).argsort() + grid.first
    text = torch.arange(grid.tokens)[grid.text_at]
    return torch.cat([text, order] if grid.text_first else [order, text])


def hilbert(place: Tensor, depth: int) -> Tensor:
    """int64 (n,): how far along the Hilbert curve of a cube of side 2**depth each place (n, axes)
    lies. Skilling's transform."""
    x = [part.clone() for part in place.long().unbind(1)]
    bit = 1 << (depth - 1)
    while bit > 1:
        for axis in range(len(x)):
            turned = (x[axis] & bit) != 0
            swap = torch.where(turned, 0, (x[0] ^ x[axis]) & (bit - 1))
            x[0] = torch.where(turned, x[0] ^ (bit - 1), x[0] ^ swap)
            if axis:
                x[axis] = x[axis] ^ swap
        bit >>= 1
    for axis in range(1, len(x)):
        x[axis] = x[axis] ^ x[axis - 1]
    flip, bit = torch.zeros_like(x[0]), 1 << (depth - 1)
    while bit > 1:
        flip = torch.where((x[-1] & bit) != 0, flip ^ (bit - 1), flip)
        bit >>= 1
    x = [part ^ flip for part in x]
    found = torch.zeros_like(x[0])
    for level in reversed(range(depth)):
        for part in x:
            found = (found << 1) | ((part >> level) & 1)
    return found


def frames_together(grid: TokenGrid) -> Tensor:
    """int64 (tokens,): the video place after place, each in all frames; text where it is."""
    video = torch.arange(grid.video).reshape(grid.frames, grid.frame).T.flatten() + grid.first
    text = torch.arange(grid.tokens)[grid.text_at]
    return torch.cat([text, video] if grid.text_first else [video, text])


def radius(share: float, places: int) -> int:
    """How far a window of a share of the places reaches to each side; everywhere for 1."""
    return places if share == 1 else int(share * places) // 2


def band(grid: TokenGrid, group: int, reach: int, block: int, device: torch.device) -> Layout:
    """Pairs at most `reach` places apart, where `group` tokens of the video in a row share a place;
    and every pair with text. One list for all heads."""
    place = torch.zeros(grid.tokens, dtype=torch.int64, device=device)
    place[grid.video_at] = torch.arange(grid.video, device=device) // group
    text = torch.zeros(grid.tokens, dtype=torch.bool, device=device)
    text[grid.text_at] = True
    pad = -grid.tokens % block
    places = torch.nn.functional.pad(place, (0, pad)).unflatten(0, (-1, block))
    texts = torch.nn.functional.pad(text, (0, pad)).unflatten(0, (-1, block))
    real = torch.ones_like(place, dtype=torch.bool)
    reals = torch.nn.functional.pad(real, (0, pad)).unflatten(0, (-1, block))
    video = reals & ~texts
    low = torch.where(video, places, 2**40).amin(1)
    high = torch.where(video, places, -(2**40)).amax(1)
    some_text, all_text = texts.any(1), (texts | ~reals).all(1)
    near = torch.maximum(low.unsqueeze(1) - high, low - high.unsqueeze(1))
    far = torch.maximum(high.unsqueeze(1) - low, high - low.unsqueeze(1))
    some = (near <= reach) | some_text.unsqueeze(1) | some_text
    whole = (far <= reach) & ~some_text.unsqueeze(1) & ~some_text
    whole |= all_text.unsqueeze(1) | all_text

    def inside(index: Tensor) -> Tensor:
        row, column = index[:, 2], index[:, 3]
        apart = (places[row].unsqueeze(2) - places[column].unsqueeze(1)).abs()
        found = (apart <= reach) | texts[row].unsqueeze(2) | texts[column].unsqueeze(1)
        return found & reals[row].unsqueeze(2) & reals[column].unsqueeze(1)

    return with_masks(some[None, None], whole[None, None], grid.tokens, grid.tokens, block, inside)


def with_masks(
    some: Tensor,
    whole: Tensor,
    queries: int,
    keys: int,
    block: int,
    inside: Callable[[Tensor], Tensor],
) -> Layout:
    """The tiles of `some`; those that are not whole get a mask.

    some, whole: bool (batch, heads, query blocks, key blocks). inside: given int64 (n, 4), the
    places of partial tiles, bool (n, block, block), False beyond the ends.
    """
    found = Layout.from_blocks(some, queries, keys, block, block)
    index = some.nonzero()
    partial = ~whole[some]
    if not bool(partial.any()):
        return found
    masks = torch.cat([bits.pack(inside(part)) for part in index[partial].split(256)])
    tiles = torch.where(partial, partial.cumsum(0) - 1, -1).to(torch.int32)
    return Layout(queries, keys, found.offsets, found.blocks, block, block, tiles, masks)
