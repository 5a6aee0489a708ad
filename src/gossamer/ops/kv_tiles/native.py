"""The compiled backend of tiled keys and values; see csrc/kv_tiles/kv_tiles.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops._dispatch import compiled, isa_index
from gossamer.ops.kv_tiles.reference import TILE, tile_count

_SMALL = 1 << 17
"""Below so many multiplications a second thread costs more than it gains."""


def serves(x: Tensor) -> bool:
    """Whether the kernels take such entries or bitmaps."""
    kinds = (torch.float32, torch.bfloat16, torch.int64)
    return x.is_cpu and x.dtype in kinds and isa_index() >= 0


def offsets(bitmaps: Tensor) -> tuple[Tensor, int]:
    """int32, where each tile's entries begin in steps of 8; and how many entries there are."""
    found = torch.empty(bitmaps.shape, dtype=torch.int32)
    count = compiled().kv_tiles_offsets(bitmaps.contiguous().flatten(), found.flatten())
    return found, count


def pack(x: Tensor, mask: Tensor, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Bitmaps, offsets and entries."""
    batch, heads, tokens, width = x.shape
    shape = (batch, heads, tokens // TILE, tile_count(width, keys))
    bitmaps, threads = torch.empty(shape, dtype=torch.int64), _threads(x.numel())
    compiled().kv_tiles_mark(mask.contiguous(), bitmaps, keys, threads, isa_index())
    begin, count = offsets(bitmaps)
    entries = x.new_zeros(count)
    compiled().kv_tiles_pack(_rows(x), bitmaps, begin, entries, keys, threads, isa_index())
    return bitmaps, begin, entries


def unpack(bitmaps: Tensor, begin: Tensor, entries: Tensor, width: int, keys: bool) -> Tensor:
    """(batch, heads, tokens, width), zeros where nothing is kept."""
    batch, heads, blocks, _ = bitmaps.shape
    x = entries.new_empty(batch, heads, blocks * TILE, width)
    parts = (part.contiguous() for part in (bitmaps, begin, entries))
    compiled().kv_tiles_unpack(*parts, x, keys, _threads(x.numel()), isa_index())
    return x


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
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if output.numel():
        tokens = TILE * sum(part.shape[2] for part in parts[::6]) + key.shape[2]
        threads = _threads(tokens * query.shape[0] * query.shape[1] * query.shape[3])
        bias = None if key_bias is None else key_bias.float().contiguous()
        compiled().kv_tiles_decode(
            _rows(query), _rows(key), _rows(value), [part.contiguous() for part in parts], bias,
            causal, scale, output, lse, threads, isa_index(),
        )  # fmt: skip
    return output, lse


def _rows(x: Tensor) -> Tensor:
    """With its last axis contiguous; the others may lie apart, as in a slice of a cache."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _threads(work: int) -> int:
    return 1 if work < _SMALL else torch.get_num_threads()
