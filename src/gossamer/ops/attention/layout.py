"""Which pairs of queries and keys are computed, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops.attention import bits, counting

_INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Layout:
    """Pairs of queries and keys: lists of key blocks per query block, and single keys per group.

    A tile is one query block by one key block; a listed tile is computed whole unless it has a
    mask. `tokens` adds single keys for groups of `group` queries; with group 1 that is any
    adjacency. No pair may be named twice. The first two axes of the offsets are (batch or 1,
    heads or a divisor of them): neighbouring heads share a list.

    Attributes
    ----------
    queries, keys : int
        Lengths. The last blocks may be ragged.
    offsets : Tensor
        int64 (batch, heads, query blocks + 1): where each query block's entries begin in `blocks`.
    blocks : Tensor
        int32 (entries,): key blocks, ascending within a query block.
    rows, columns : int
        Queries and keys of a tile.
    tiles : Tensor or None
        int32 (entries,): each entry's place in `masks`, -1 where the whole tile counts.
    masks : Tensor or None
        uint8 (n, rows, 2 * ceil(columns / 16)): bits of the keys, lowest first. See `bits.pack`.
    token_offsets, tokens : Tensor or None
        int64 (batch, heads, groups + 1) and int32 (n,): keys of each group of queries, ascending.
    group : int
        Queries of a group; divides `rows` or is a multiple of it.
    """

    queries: int
    keys: int
    offsets: Tensor
    blocks: Tensor
    rows: int = 64
    columns: int = 64
    tiles: Tensor | None = None
    masks: Tensor | None = None
    token_offsets: Tensor | None = None
    tokens: Tensor | None = None
    group: int = 1

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "rows", "columns", "group"):
            least = 0 if name in ("queries", "keys") else 1
            if not least <= getattr(self, name) <= _INT32:
                raise UsageError(
                    f"a layout's {name} is at least {least}, not {getattr(self, name)}"
                )
        _check_lists("blocks", self.offsets, self.blocks, self.query_blocks, self.key_blocks)
        if (self.tiles is None) != (self.masks is None):
            raise UsageError("a layout's tiles and masks come together")
        if self.tiles is not None and self.masks is not None:
            self._check_masks(self.tiles, self.masks)
        if (self.token_offsets is None) != (self.tokens is None):
            raise UsageError("a layout's token_offsets and tokens come together")
        if self.token_offsets is not None and self.tokens is not None:
            self._check_tokens(self.token_offsets, self.tokens)

    @classmethod
    def from_blocks(
        cls, mask: Tensor, queries: int, keys: int, rows: int = 64, columns: int = 64
    ) -> Layout:
        """The tiles where `mask`, bool (..., query blocks, key blocks) with up to four axes, is True."""
        mask = _four(mask)
        wanted = (-(-queries // rows), -(-keys // columns))
        if mask.shape[2:] != wanted:
            raise UsageError(
                f"a block mask of {tuple(mask.shape[2:])} blocks, but {queries} queries and {keys} "
                f"keys make {wanted} blocks of {rows} x {columns}"
            )
        return cls(queries, keys, _offsets(mask.sum(-1)), _columns(mask), rows, columns)

    @classmethod
    def from_mask(cls, mask: Tensor, rows: int = 64, columns: int = 64) -> Layout:
        """Exactly the pairs where `mask`, bool (..., queries, keys) with up to four axes, is True.

        Tiles that are all True need no mask of their own.
        """
        mask = _four(mask)
        queries, keys = mask.shape[2:]
        tiles = bits.tiled(mask, rows, columns)  # (batch, heads, q blocks, k blocks, rows, columns)
        exists = bits.tiled(torch.ones_like(mask[:1, :1]), rows, columns)
        some = tiles.flatten(-2).any(-1)
        partial = ((tiles == exists).flatten(-2).all(-1) ^ some) & some
        tile_of = torch.where(partial, partial.flatten().cumsum(0).reshape(partial.shape) - 1, -1)
        return cls(
            queries, keys, _offsets(some.sum(-1)), _columns(some), rows, columns,
            tile_of[some].to(torch.int32), bits.pack(tiles[partial]),
        )  # fmt: skip

    @classmethod
    def from_csr(cls, offsets: Tensor, columns: Tensor, keys: int, group: int = 1) -> Layout:
        """An adjacency: `columns` (n,) lists keys, ascending, of groups of `group` queries.

        `offsets` is (groups + 1,), or (batch, heads, groups + 1), and rises from 0 to n. The
        number of queries is groups * group; see `with_tokens` for another one.
        """
        queries = (offsets.shape[-1] - 1) * group
        return cls.empty(queries, keys, group).with_tokens(offsets, columns, group)

    @classmethod
    def empty(cls, queries: int, keys: int, rows: int = 64, columns: int = 64) -> Layout:
        """No pair at all, to add tokens to."""
        rows = rows * -(-64 // rows) if rows < 64 else rows  # small blocks would be slow
        shape = (-(-queries // rows), -(-keys // columns))
        return cls.from_blocks(torch.zeros(shape, dtype=torch.bool), queries, keys, rows, columns)

    def with_tokens(self, offsets: Tensor, tokens: Tensor, group: int) -> Layout:
        """The same tiles, and for each group of `group` queries the keys of `tokens`, ascending.

        A key in a listed tile of its whole group is left out, for the tile computes it. Raises
        UsageError where only some of the group's queries have it in a tile.
        """
        if self.tokens is not None:
            raise UsageError("this layout has tokens already")
        offsets = offsets.reshape(1, 1, -1) if offsets.dim() == 1 else offsets
        groups = -(-self.queries // group) if group > 0 else 0
        _check_lists("tokens", offsets, tokens, groups, self.keys)
        _check_group(self.rows, group)
        self._check_heads(offsets)
        covered, shared = counting.covered(self, offsets, tokens, group)
        if bool((covered & ~shared).any()):
            raise UsageError(
                "a key of the token index lies in a tile of only some queries of its group, or in "
                "a masked tile: leave it out of the tiles, or take smaller groups"
            )
        row, lists = counting.rows_of(offsets)[~covered], offsets.shape[0] * offsets.shape[1]
        counts = torch.bincount(row, minlength=lists * groups)
        kept = _offsets(counts.reshape(*offsets.shape[:-1], groups))
        return replace(
            self, token_offsets=kept, tokens=tokens[~covered].to(torch.int32), group=group
        )

    @property
    def query_blocks(self) -> int:
        """How many blocks the queries make."""
        return -(-self.queries // self.rows)

    @property
    def key_blocks(self) -> int:
        """How many blocks the keys make."""
        return -(-self.keys // self.columns)

    def density(
        self,
        causal: bool = False,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> float:
        """Computed pairs over all pairs, or over causal pairs; counted exactly.

        Positions as `attention` takes them. 1.0 where there is no pair to compute.
        """
        return counting.density(self, causal, query_positions, key_positions)

    def to(self, device: torch.device | str) -> Layout:
        """The same on another device."""
        moved = {
            name: part.to(device)
            for name in ("offsets", "blocks", "tiles", "masks", "token_offsets", "tokens")
            if (part := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def _check_masks(self, tiles: Tensor, masks: Tensor) -> None:
        if tiles.dtype != torch.int32 or tiles.shape != self.blocks.shape:
            raise UsageError(f"tiles are int32 {tuple(self.blocks.shape)}, one for each entry")
        wanted = (self.rows, bits.row_bytes(self.columns))
        if masks.dtype != torch.uint8 or masks.dim() != 3 or masks.shape[1:] != wanted:
            raise UsageError(
                f"masks are uint8 (n, {wanted[0]}, {wanted[1]}), not {tuple(masks.shape)}"
            )
        if tiles.numel() and not (int(tiles.min()) >= -1 and int(tiles.max()) < masks.shape[0]):
            raise UsageError(f"a tile's mask is -1 to {masks.shape[0] - 1}")

    def _check_tokens(self, offsets: Tensor, tokens: Tensor) -> None:
        _check_group(self.rows, self.group)
        _check_lists("tokens", offsets, tokens, -(-self.queries // self.group), self.keys)
        self._check_heads(offsets)
        if bool(counting.covered(self, offsets, tokens, self.group)[0].any()):
            raise UsageError("a key is both in a tile and in the token index; see with_tokens")

    def _check_heads(self, offsets: Tensor) -> None:
        if offsets.shape[:2] != self.offsets.shape[:2] and self.blocks.numel():
            raise UsageError(
                f"token lists for {tuple(offsets.shape[:2])} batches and heads, block lists for "
                f"{tuple(self.offsets.shape[:2])}"
            )


def _check_group(rows: int, group: int) -> None:
    if group < 1 or (rows % group and group % rows):
        raise UsageError(f"groups of {group} queries neither divide blocks of {rows} nor hold them")


def _check_lists(name: str, offsets: Tensor, columns: Tensor, rows: int, limit: int) -> None:
    """Raise UsageError unless these are sorted lists of numbers below `limit`, for so many rows."""
    if offsets.dtype != torch.int64 or offsets.dim() != 3 or offsets.shape[-1] != rows + 1:
        raise UsageError(
            f"offsets of {name} are int64 (batch, heads, {rows + 1}), not {offsets.dtype} "
            f"{tuple(offsets.shape)}"
        )
    if columns.dtype not in (torch.int32, torch.int64) or columns.dim() != 1:
        raise UsageError(
            f"{name} are a vector of int32, not {columns.dtype} {tuple(columns.shape)}"
        )
    if not offsets.numel():
        raise UsageError(f"offsets of {name} are for at least one head")
    flat = offsets.flatten(0, 1)
    ends = int(flat[0, 0]) == 0 and int(flat[-1, -1]) == columns.numel()
    if not ends or bool((offsets.flatten().diff() < 0).any()):
        raise UsageError(f"offsets of {name} do not rise from 0 to {columns.numel()}")
    if bool((flat[1:, 0] != flat[:-1, -1]).any()):
        raise UsageError(f"offsets of {name}: a head begins where the one before it ends")
    if not columns.numel():
        return
    low, high = int(columns.min()), int(columns.max())
    if low < 0 or high >= limit:
        raise UsageError(f"{name} are 0 to {limit - 1}; found {low if low < 0 else high}")
    row = counting.rows_of(offsets)
    repeated = (columns.diff() <= 0) & (row.diff() == 0)
    if bool(repeated.any()):
        at = int(repeated.nonzero()[0, 0])
        raise UsageError(
            f"{name} of one list ascend, none twice; found {int(columns[at])} before "
            f"{int(columns[at + 1])}"
        )


def _four(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
        raise UsageError(f"a mask is bool with 2 to 4 axes, not {mask.dtype} {tuple(mask.shape)}")
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def _offsets(counts: Tensor) -> Tensor:
    """int64 (batch, heads, rows + 1) from the lengths of the lists."""
    ends = counts.flatten().cumsum(0).reshape(counts.shape)
    starts = torch.nn.functional.pad((ends - counts), (0, 1))
    if counts.shape[-1]:
        starts[..., -1] = ends[..., -1]
    return starts


def _columns(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, -1].to(torch.int32)
