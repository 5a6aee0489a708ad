"""Masks of tiles as bits, and tokens cut into tiles."""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(columns: int) -> int:
    """Bytes of a row of bits: whole words of 16."""
    return 2 * -(-columns // 16)


def tiled(mask: Tensor, rows: int, columns: int) -> Tensor:
    """(..., queries, keys) as (..., query blocks, key blocks, rows, columns), False beyond the ends."""
    queries, keys = mask.shape[-2:]
    padded = torch.nn.functional.pad(mask, (0, -keys % columns, 0, -queries % rows))
    blocks = padded.unflatten(-1, (-1, columns)) if keys else padded.unflatten(-1, (0, columns))
    blocks = blocks.unflatten(-3, (-1, rows)) if queries else blocks.unflatten(-3, (0, rows))
    return blocks.transpose(-2, -3)


def pack(tiles: Tensor) -> Tensor:
    """bool (n, rows, columns) as uint8 (n, rows, row_bytes), the first key in the lowest bit."""
    width = row_bytes(tiles.shape[-1])
    padded = torch.nn.functional.pad(tiles, (0, 8 * width - tiles.shape[-1])).to(torch.uint8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=tiles.device)
    return (padded.unflatten(-1, (width, 8)) * powers).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse: bool (n, rows, columns)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    whole = (packed.unsqueeze(-1) >> shifts) & 1
    return whole.flatten(-2)[..., :columns].bool()
