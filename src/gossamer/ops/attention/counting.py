"""Exact counts of what a layout computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.core.attention import causal_pairs
from gossamer.ops.attention import bits
from gossamer.ops.attention.positions import as_positions, default_positions, head_of

if TYPE_CHECKING:
    from gossamer.ops.attention.layout import Layout

_CHUNK = 1 << 22


def rows_of(offsets: Tensor) -> Tensor:
    """int64 (n,): for each entry the list it belongs to, counted over batch, heads and rows."""
    return torch.repeat_interleave(offsets.diff(dim=-1).flatten())


def covered(layout: Layout, offsets: Tensor, tokens: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """bool (n,) each: tokens in a tile of any query of their group; in whole tiles of all of them."""
    if not layout.blocks.numel() or not tokens.numel():
        nothing = torch.zeros_like(tokens, dtype=torch.bool)
        return nothing, nothing
    groups, blocks = offsets.shape[-1] - 1, layout.query_blocks
    row = rows_of(offsets)
    head, index = row // groups, row % groups
    span = max(1, group // layout.rows)
    listed = rows_of(layout.offsets) * layout.key_blocks + layout.blocks
    some = torch.zeros_like(tokens, dtype=torch.bool)
    every = torch.ones_like(some)
    lists = layout.offsets.shape[0] * layout.offsets.shape[1]
    for step in range(span):
        block = index * group // layout.rows + step
        exists = block < blocks
        wanted = ((head % lists) * blocks + block.clamp(max=blocks - 1)) * layout.key_blocks
        wanted = wanted + tokens // layout.columns
        at = torch.searchsorted(listed, wanted).clamp(max=listed.numel() - 1)
        found = (listed[at] == wanted) & exists
        whole = found if layout.tiles is None else found & (layout.tiles[at] < 0)
        some |= found
        every &= whole | ~exists
    return some, some & every


def lists(layout: Layout) -> int:
    """How many batches times heads have lists of their own."""
    given = layout.offsets
    if layout.token_offsets is not None and not layout.blocks.numel():
        given = layout.token_offsets
    return given.shape[0] * given.shape[1]


def pairs(layout: Layout, causal: bool) -> int:
    """How many pairs the lists name. Queries are the last of the keys, where causal."""
    tiles = int(_tile_pairs(layout, causal).sum())
    past = layout.keys - layout.queries
    if layout.token_offsets is None or layout.tokens is None:
        return tiles
    group = rows_of(layout.token_offsets) % max(1, layout.token_offsets.shape[-1] - 1)
    first = group * layout.group
    size = (layout.queries - first).clamp(max=layout.group)
    key, one = layout.tokens.long(), torch.ones_like(size)
    return tiles + int((causal_pairs(first + past, size, key, one) if causal else size).sum())


def density(
    layout: Layout, causal: bool, query_positions: Tensor | None, key_positions: Tensor | None
) -> float:
    """Computed pairs over all pairs, or over causal ones."""
    start, device = layout.keys - layout.queries, layout.blocks.device
    queries = as_positions("query_positions", query_positions, layout.queries)
    keys = as_positions("key_positions", key_positions, layout.keys)
    if not causal or (start >= 0 and queries is None and keys is None):
        return _plain_density(layout, causal)
    queries = default_positions(layout.queries, start, device) if queries is None else queries
    keys = default_positions(layout.keys, 0, device) if keys is None else keys
    lists = [
        part for part in (layout.offsets, layout.token_offsets, queries, keys) if part is not None
    ]
    batch = max(part.shape[0] for part in lists)
    heads = max(part.shape[1] for part in lists)
    found = total = 0
    for b in range(batch):
        for h in range(heads):
            q, k = (head_of(part, b, h, heads) for part in (queries, keys))
            found += _in_tiles(layout, b, h, heads, q, k) + _in_lists(layout, b, h, heads, q, k)
            total += int(torch.searchsorted(k.sort().values, q, right=True).sum())
    return found / total if total else 1.0


def _plain_density(layout: Layout, causal: bool) -> float:
    past, n = layout.keys - layout.queries, layout.queries
    possible = n * past + n * (n + 1) // 2 if causal else n * layout.keys
    return pairs(layout, causal) / (possible * lists(layout)) if possible else 1.0


def _tile_pairs(layout: Layout, causal: bool) -> Tensor:
    """int64 (entries,): the pairs that each listed tile computes."""
    row = rows_of(layout.offsets) % max(1, layout.query_blocks) * layout.rows
    column = layout.blocks.long() * layout.columns
    height = (layout.queries - row).clamp(max=layout.rows)
    width = (layout.keys - column).clamp(max=layout.columns)
    position = row + layout.keys - layout.queries
    found = causal_pairs(position, height, column, width) if causal else height * width
    if layout.tiles is None or layout.masks is None or not layout.masks.shape[0]:
        return found
    for entries in (layout.tiles >= 0).nonzero()[:, 0].split(1024):
        mask = bits.unpack(layout.masks[layout.tiles[entries].long()], layout.columns)
        query = torch.arange(layout.rows, device=mask.device)
        key = torch.arange(layout.columns, device=mask.device)
        inside = (query < height[entries].unsqueeze(1)).unsqueeze(2)
        inside = inside & (key < width[entries].unsqueeze(1)).unsqueeze(1)
        if causal:
            ahead = (position - column)[entries].reshape(-1, 1, 1)
            inside &= (ahead + query.unsqueeze(1) - key) >= 0
        found[entries] = (mask & inside).sum((1, 2))
    return found


def _in_tiles(layout: Layout, b: int, h: int, heads: int, q: Tensor, k: Tensor) -> int:
    offsets = head_of(layout.offsets, b, h, heads)
    begin, end = int(offsets[0]), int(offsets[-1])
    row, column = torch.repeat_interleave(offsets.diff()), layout.blocks[begin:end].long()
    tile = None if layout.tiles is None else layout.tiles[begin:end].long()
    queries = _padded(q, layout.rows, -(2**31))  # before every key
    keys = _padded(k, layout.columns, 2**31)  # after every query
    inside = queries > -(2**31)
    least = torch.where(inside, queries, 2**31).amin(1)
    simple = keys.amax(1)[column] <= least[row]  # ragged keys never are
    simple &= inside.all(1)[row]
    if tile is not None:
        simple &= tile < 0
    found = int(simple.sum()) * layout.rows * layout.columns
    rest = (~simple).nonzero()[:, 0]
    for part in rest.split(max(1, _CHUNK // (layout.rows * layout.columns))):
        pairs = queries[row[part]].unsqueeze(2) >= keys[column[part]].unsqueeze(1)
        if tile is not None and layout.masks is not None and layout.masks.shape[0]:
            masks = bits.unpack(layout.masks[tile[part].clamp(min=0)], layout.columns)
            pairs &= masks | (tile[part] < 0).reshape(-1, 1, 1)
        found += int(pairs.sum())
    return found


def _in_lists(layout: Layout, b: int, h: int, heads: int, q: Tensor, k: Tensor) -> int:
    if layout.token_offsets is None or layout.tokens is None:
        return 0
    offsets = head_of(layout.token_offsets, b, h, heads)
    row = torch.repeat_interleave(offsets.diff())
    keys = k[layout.tokens[int(offsets[0]) : int(offsets[-1])].long()]
    groups = _padded(q, layout.group, -(2**31)).sort(dim=1).values
    found = 0
    step = max(1, _CHUNK // layout.group)
    for rows, limits in zip(row.split(step), keys.split(step), strict=True):
        before = torch.searchsorted(groups[rows], limits.unsqueeze(1))
        found += int((layout.group - before).sum())
    return found


def _padded(positions: Tensor, size: int, beyond: int) -> Tensor:
    """int64 (blocks, size), `beyond` past the end."""
    padded = torch.nn.functional.pad(positions.long(), (0, -positions.numel() % size), value=beyond)
    return padded.reshape(-1, size)
