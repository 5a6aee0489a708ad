"""Keys and values of a cache of which few entries are kept, and attention that reads them so.

`pack` makes `Tiles` of keys or values; `decode` multiplies the tiles without making them dense
again, and joins them with dense tokens in one softmax. Memory falls with the kept entries: each
tile of 64 costs 12 bytes for its bitmap and offset, and its entries, padded to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.attention import Layout, State, attention
from gossamer.ops.attention.checks import check_inputs, check_key_bias
from gossamer.ops.kv_tiles import native, reference
from gossamer.ops.kv_tiles.reference import TILE, tile_count
from gossamer.ops.kv_tiles.tiles import Tiles, pairs

__all__ = ["TILE", "Tiles", "decode", "pack", "unpack"]

_MANY = 16
"""With more queries the tiles are made dense once, rather than read for every few queries."""


def pack(x: Tensor, mask: Tensor, *, keys: bool) -> Tiles:
    """Tiles of the entries of x where the mask is True.

    Parameters
    ----------
    x : Tensor
        Floating (batch, heads, tokens, width); tokens are a multiple of 64.
    mask : Tensor
        bool, the shape of x.
    keys : bool
        Whether x are keys, whose tiles run along the tokens, or values.
    """
    if x.dim() != 4 or not x.is_floating_point() or not x.shape[3] or x.shape[2] % TILE:
        raise UsageError(
            f"x is floating (batch, heads, tokens, width) with a multiple of {TILE} tokens, not "
            f"{x.dtype} {tuple(x.shape)}"
        )
    if mask.dtype != torch.bool or mask.shape != x.shape or mask.device != x.device:
        raise UsageError(
            f"the mask is bool {tuple(x.shape)} on {x.device}, not {mask.dtype} "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    call = _pack_by_backend if _dispatch.direct() else _pack
    bitmaps, offsets, entries = call(x.detach(), mask, keys)
    return Tiles(bitmaps, offsets, entries, x.shape[3], keys)


def unpack(tiles: Tiles) -> Tensor:
    """(batch, heads, tokens, width), with zeros where no entry was kept."""
    call = _unpack_by_backend if _dispatch.direct() else _unpack
    return call(*tiles.parts, tiles.width, tiles.keys)


def decode(
    query: Tensor,
    keys: Sequence[Tiles],
    values: Sequence[Tiles],
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> State:
    """Attention over tiles and the dense tokens behind them, in one softmax: (output, lse).

    Made for few queries; keys are not repeated for the query heads that share them. Not
    differentiable.

    Parameters
    ----------
    query : Tensor
        (batch, heads, queries, width), float32 or bfloat16; sums are float32. Other floating
        dtypes, and devices other than the CPU, are served by the reference.
    keys, values : sequence of Tiles
        Parts of the tokens, in their order.
    key, value : Tensor
        (batch, kv_heads, n, width) and (.., value width): the tokens behind them; n may be 0.
    causal : bool
        Whether the queries are the last of the dense tokens, and see no token behind themselves.
    scale : float or None
        Factor of the products; 1 / sqrt(width) where None.
    key_bias : Tensor or None
        (batch or 1, heads or a divisor, tokens), of the tiles first, added to the logits; -inf
        leaves a token out.
    """
    scale = check_inputs(query, key, value, scale)
    parts = pairs(tuple(keys), tuple(values))
    for tiles, dense in [*((one, key) for one in keys), *((one, value) for one in values)]:
        _check_tiles(tiles, dense)
    tokens = key.shape[2] + sum(part.tokens for part in keys)
    check_key_bias(key_bias, query, tokens)
    if causal and query.shape[2] > key.shape[2]:
        raise UsageError(
            f"causal queries are among the dense tokens, but there are {query.shape[2]} of them "
            f"and {key.shape[2]} dense tokens"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UsageError("decode has no gradients: use torch.no_grad()")
    if query.shape[2] > _MANY:
        key = torch.cat([*map(unpack, keys), key], dim=2)
        value = torch.cat([*map(unpack, values), value], dim=2)
        every = torch.ones(-(-query.shape[2] // 64), -(-tokens // 64), dtype=torch.bool)
        layout = Layout.from_blocks(every, query.shape[2], tokens).to(query.device)
        return attention(query, key, value, layout, causal=causal, scale=scale, key_bias=key_bias)
    call = _decode_by_backend if _dispatch.direct() else _decode
    return call(query, key, value, parts, key_bias, causal, scale)


def _check_tiles(tiles: Tiles, dense: Tensor) -> None:
    batch, heads, _, width = tiles.shape
    have, wanted = (batch, heads, width), (dense.shape[0], dense.shape[1], dense.shape[3])
    if have != wanted or tiles.entries.dtype != dense.dtype or tiles.entries.device != dense.device:
        raise UsageError(
            f"tiles of (batch, heads, width) {have}, {tiles.entries.dtype} on "
            f"{tiles.entries.device}, but the dense tokens are {wanted}, {dense.dtype} on "
            f"{dense.device}"
        )


def _pack_by_backend(x: Tensor, mask: Tensor, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (native if native.serves(x) else reference).pack(x, mask, keys)


def _unpack_by_backend(
    bitmaps: Tensor, offsets: Tensor, entries: Tensor, width: int, keys: bool
) -> Tensor:
    backend = native if native.serves(entries) else reference
    return backend.unpack(bitmaps, offsets, entries, width, keys)


def _decode_by_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: list[Tensor],
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    backend = native if native.serves(query) else reference
    return backend.decode(query, key, value, parts, key_bias, causal, scale)


@torch.library.custom_op("gossamer::kv_tiles_pack", mutates_args=())
def _pack(x: Tensor, mask: Tensor, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _pack_by_backend(x, mask, keys)


@_pack.register_fake
def _(x: Tensor, mask: Tensor, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, width = x.shape
    bitmaps = x.new_empty(batch, heads, tokens // TILE, tile_count(width, keys), dtype=torch.int64)
    count = torch.library.get_ctx().new_dynamic_size()
    return bitmaps, torch.empty_like(bitmaps, dtype=torch.int32), x.new_empty(count)


@torch.library.custom_op("gossamer::kv_tiles_unpack", mutates_args=())
def _unpack(bitmaps: Tensor, offsets: Tensor, entries: Tensor, width: int, keys: bool) -> Tensor:
    return _unpack_by_backend(bitmaps, offsets, entries, width, keys)


@_unpack.register_fake
def _(bitmaps: Tensor, offsets: Tensor, entries: Tensor, width: int, keys: bool) -> Tensor:
    batch, heads, blocks, _ = bitmaps.shape
    return entries.new_empty(batch, heads, blocks * TILE, width)


@torch.library.custom_op("gossamer::kv_tiles_decode", mutates_args=())
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: list[Tensor],
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _decode_by_backend(query, key, value, parts, key_bias, causal, scale)


@_decode.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    return output, query.new_empty(query.shape[:3], dtype=sums)
