"""Keys or values of which few entries are kept, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.ops.kv_tiles import native, reference
from gossamer.ops.kv_tiles.reference import STEP, TILE, tile_count


@dataclass(frozen=True, eq=False)
class Tiles:
    """Entries of (batch, heads, tokens, width) that are kept, in tiles of 64 neighbours.

    A tile is a bitmap, first neighbour in the lowest bit, and the kept entries behind each other,
    padded with zeros to a multiple of 8. Of keys it holds 64 tokens of one channel, of values 64
    channels of one token: that is the order in which attention adds them up.

    Attributes
    ----------
    bitmaps : Tensor
        int64 (batch, heads, tokens / 64, tiles of 64 tokens): `width` tiles of keys, or 64 tiles of
        values for every 64 channels begun.
    offsets : Tensor
        int32, the shape of bitmaps: where each tile's entries begin, in steps of 8.
    entries : Tensor
        Floating vector: what is kept, in the order of the tiles.
    width : int
        Channels of a head.
    keys : bool
        Whether tiles run along the tokens, as those of keys do, or along the channels.
    """

    bitmaps: Tensor
    offsets: Tensor
    entries: Tensor
    width: int
    keys: bool

    def __post_init__(self) -> None:
        shape, wanted = tuple(self.bitmaps.shape), tile_count(self.width, self.keys)
        if self.bitmaps.dtype != torch.int64 or len(shape) != 4 or shape[3] != wanted:
            raise FormatError(
                f"bitmaps are int64 (batch, heads, blocks, {wanted}) for a width of {self.width}, "
                f"not {self.bitmaps.dtype} {shape}"
            )
        if self.offsets.dtype != torch.int32 or tuple(self.offsets.shape) != shape:
            raise FormatError(
                f"offsets are int32 {shape}, not {self.offsets.dtype} {tuple(self.offsets.shape)}"
            )
        if self.entries.dim() != 1 or not self.entries.is_floating_point():
            raise FormatError(
                f"entries are a floating vector, not {self.entries.dtype} "
                f"{tuple(self.entries.shape)}"
            )
        self._check_bits()

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.bitmaps.shape[2] * TILE

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, width)."""
        return self.bitmaps.shape[0], self.bitmaps.shape[1], self.tokens, self.width

    @property
    def nbytes(self) -> int:
        """Bytes of bitmaps, offsets and entries."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bitmaps, offsets and entries."""
        return self.bitmaps, self.offsets, self.entries

    def select(self, batch: Tensor) -> Tiles:
        """The batches of these numbers, int64 (n,), in their order; one may occur several times."""
        starts = STEP * self.offsets.flatten(1)[:, 0].long() if self.tokens else [0] * self.shape[0]
        ends = [*list(map(int, starts[1:])), self.entries.numel()]
        chosen = [slice(int(starts[i]), ends[i]) for i in batch.tolist()]
        bitmaps = self.bitmaps[batch.to(self.bitmaps.device)]
        entries = torch.cat([self.entries[:0], *(self.entries[part] for part in chosen)])
        return replace(self, bitmaps=bitmaps, offsets=_offsets(bitmaps)[0], entries=entries)

    def to(self, device: torch.device | str) -> Tiles:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("bitmaps", "offsets", "entries")}
        return replace(self, **moved)

    def _check_bits(self) -> None:
        """Raise FormatError unless bitmaps, offsets and entries belong together."""
        offsets, count = _offsets(self.bitmaps)
        if count != self.entries.numel() or not torch.equal(offsets, self.offsets):
            raise FormatError(
                f"bitmaps that keep {count} entries, padding included, but there are "
                f"{self.entries.numel()}, or the offsets name other places"
            )
        spare = 0 if self.keys else -self.width % TILE
        if spare and bool((self.bitmaps[..., -TILE:] >> (TILE - spare)).any()):
            raise FormatError(f"a bitmap keeps channels from {self.width} on, which do not exist")


def _offsets(bitmaps: Tensor) -> tuple[Tensor, int]:
    return (native if native.serves(bitmaps) else reference).offsets(bitmaps)


def pairs(keys: tuple[Tiles, ...], values: tuple[Tiles, ...]) -> list[Tensor]:
    """The parts of both, in turns; raises UsageError where they are not of the same tokens."""
    if len(keys) != len(values):
        raise UsageError(f"{len(keys)} tiles of keys, {len(values)} of values")
    for key, value in zip(keys, values, strict=True):
        if not key.keys or value.keys or key.shape[:3] != value.shape[:3]:
            raise UsageError(
                f"tiles of keys {key.shape} and of values {value.shape} are not of the same tokens"
            )
    return [part for both in zip(keys, values, strict=True) for one in both for part in one.parts]
