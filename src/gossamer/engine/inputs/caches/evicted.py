"""Rows of which a method evicts: heads keep different keys, and memory falls to what they keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.core.attention import CachedKeys
from gossamer.core.errors import FormatError, UsageError
from gossamer.engine.inputs.caches.rows import Keeper, Prompt, Read, Rows, Shape, every_pair
from gossamer.engine.inputs.protocols import KeyEvictor, RollingEvictor
from gossamer.ops.attention import State, attention, decode

_ROOM = 64
"""Rows of each head to spare, for tokens to come."""


class EvictingKeeper(Keeper):
    """Makes rows that keep what the method keeps of each prompt, and all tokens behind it."""

    def __init__(self, method: KeyEvictor, layer: int, layers: int) -> None:
        self.method, self.layer, self.layers = method, layer, layers
        self.last = method.last
        self.rolling: tuple[int, int] | None = None
        """First keys and window of a method that gives up a key for each new one."""
        if isinstance(method, RollingEvictor) and method.rolls():
            self.rolling = method.sinks, method.window

    def start(self, prompt: Prompt) -> Rows:
        """Evict from the first prompt."""
        texts, heads, length, _ = prompt.key.shape
        rows = EvictedRows(self)
        positions = torch.arange(length, device=prompt.key.device).expand(texts, heads, length)
        rows._length = length
        rows.evict(prompt.key, prompt.value, positions, prompt.query, prompt.scale)
        return rows

    def kept(self, cached: CachedKeys) -> Tensor:
        """The method's choice, checked."""
        if not cached.positions.shape[1]:
            return cached.exists
        with torch.no_grad():
            kept = self.method.kept_keys(cached)
        name = self.method.card.name
        if kept.dtype != torch.bool or kept.shape != cached.positions.shape:
            raise UsageError(
                f"{name} kept {kept.dtype} {tuple(kept.shape)}, not bool "
                f"{tuple(cached.positions.shape)}"
            )
        kept = kept & cached.exists
        if bool((cached.exists.any(1) & ~kept.any(1)).any()):
            raise UsageError(f"{name} left a head of layer {self.layer} without keys")
        return kept

    def restore(self, tensors: Mapping[str, Tensor], texts: int, length: int) -> Rows:
        """The rows of a file."""
        key, value, positions, counts = (
            tensors[name] for name in ("key", "value", "positions", "counts")
        )
        total = len(positions) if positions.dim() == 1 else -1
        if (
            len(tensors) != 4 or counts.dtype != torch.int64 or positions.dtype != torch.int32
            or counts.dim() != 2 or counts.shape[0] != texts or bool((counts < 0).any())
            or bool((counts > length).any()) or int(counts.sum()) != total
            or key.dim() != 2 or value.dim() != 2 or len(key) != total or len(value) != total
            or key.dtype != value.dtype or not key.is_floating_point()
        ):  # fmt: skip
            raise FormatError("a cache's rows do not fit their counts: the file is damaged")
        most = int(counts.max()) if counts.numel() else 0
        exists = torch.arange(most) < counts.unsqueeze(-1)
        padded = [x.new_zeros(*counts.shape, most, x.shape[1]) for x in (key, value)]
        places = torch.full(exists.shape, -1)
        for whole, part in zip((*padded, places), (key, value, positions.long()), strict=True):
            whole[exists] = part
        falls = (places.diff(dim=-1) <= 0) & exists[..., 1:]
        if bool(falls.any()) or bool((positions < 0).any()) or bool((positions >= length).any()):
            raise FormatError("a cache's positions do not rise within its text: damaged file")
        rows = EvictedRows(self)
        rows._length = length
        rows.pack(padded[0], padded[1], places, exists)
        return rows


class EvictedRows(Rows):
    """Rows of all heads in one tensor, one stretch for each text and head.

    A stretch has room for tokens to come; once one is full all are laid out anew. `index` lists the
    rows of each head as `gossamer.ops.attention.decode` takes them.
    """

    def __init__(self, keeper: EvictingKeeper) -> None:
        self.keeper = keeper
        self._length = 0
        self.since = 0
        """Tokens since something was given up."""
        self._turn = 0
        """Which row of a full window is given up next."""

    @property
    def length(self) -> int:
        """Tokens of each text, those given up included."""
        return self._length

    @property
    def shape(self) -> Shape:
        """Of what it was given."""
        widths = self._key.shape[-1], self._value.shape[-1]
        return Shape(self._counts.shape[1], *widths, self._key.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (self._key, self._value, self._positions, self._index, self._counts, self._starts)
        return sum(x.untyped_storage().nbytes() for x in parts)

    @property
    def rows(self) -> int:
        """Keys held."""
        return self._total

    @property
    def counts(self) -> Tensor:
        """int64 (texts, kv_heads): keys of each head."""
        return self._counts

    @property
    def positions(self) -> list[list[Tensor]]:
        """By text and head, the places in the text of the keys held, ascending."""
        _, _, places, exists = self._padded()
        return [
            [places[t, h][exists[t, h]] for h in range(places.shape[1])]
            for t in range(places.shape[0])
        ]

    def evict(
        self, key: Tensor, value: Tensor, positions: Tensor, query: Tensor, scale: float
    ) -> None:
        """Keep what the method keeps of (texts, kv_heads, n, width); positions -1 are no keys."""
        keeper = self.keeper
        kept = [
            keeper.kept(
                CachedKeys(
                    query[t], key[t], value[t], positions[t], self.length, scale, keeper.layer,
                    keeper.layers,
                )
            )
            for t in range(key.shape[0])
        ]  # fmt: skip
        self.pack(key, value, positions, torch.stack(kept))
        self.since = 0

    def pack(
        self, key: Tensor, value: Tensor, positions: Tensor, kept: Tensor, spare: int = _ROOM
    ) -> None:
        """Lay out the kept ones of (texts, kv_heads, n, ...), with room behind each head's."""
        self._counts = kept.sum(-1)
        room = self._counts + spare
        ends = room.flatten().cumsum(0).reshape(room.shape)
        self._starts = ends - room
        total = int(ends.flatten()[-1]) if ends.numel() else 0
        self._total = int(self._counts.sum())
        self._most, self._free = (int(x) if x.numel() else 0 for x in (
            self._counts.max(), (room - self._counts).min()
        ))  # fmt: skip
        places = (self._starts.unsqueeze(-1) + kept.long().cumsum(-1) - 1)[kept]
        self._key = key.new_zeros(total, key.shape[-1])
        self._value = value.new_zeros(total, value.shape[-1])
        self._positions = torch.zeros(total, dtype=torch.int32, device=key.device)
        self._key[places], self._value[places] = key[kept], value[kept]
        self._positions[places] = positions[kept].to(torch.int32)
        column = torch.arange(int(room.max()) if room.numel() else 0, device=key.device)
        listed = self._starts.unsqueeze(-1) + column
        listed = torch.where(column < self._counts.unsqueeze(-1), listed, -1)
        self._index = listed.flatten(0, 1).unsqueeze(1).to(torch.int32)
        self._turn = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens; a full window gives up its oldest for a single one."""
        new = key.shape[2]
        rolling = self.keeper.rolling
        if new == 1 and rolling is not None and self._most == sum(rolling):
            self._replace(key, value, *rolling)
            return
        if new > self._free:
            self.pack(*self._padded(), spare=new + _ROOM)
        column = self._counts.unsqueeze(-1) + torch.arange(new, device=key.device)
        places = self._starts.unsqueeze(-1) + column
        self._write(places, key, value)
        lists = self._index.reshape(*places.shape[:2], -1)
        lists.scatter_(2, column, places.to(torch.int32))
        self._counts += new
        self._total += new * self._counts.numel()
        self._most += new
        self._free -= new
        self.since += new

    def _replace(self, key: Tensor, value: Tensor, sinks: int, window: int) -> None:
        self._write((self._starts + sinks + self._turn).unsqueeze(-1), key, value)
        self._turn = (self._turn + 1) % window
        self.since = 0

    def _write(self, places: Tensor, key: Tensor, value: Tensor) -> None:
        flat, new = places.flatten(), key.shape[2]
        self._key[flat] = key.reshape(-1, key.shape[-1])
        self._value[flat] = value.reshape(-1, value.shape[-1])
        text = torch.arange(self.length, self.length + new, dtype=torch.int32, device=key.device)
        self._positions[flat] = text.expand(places.shape).flatten()
        self._length += new

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Read]:
        """Over all rows of each head."""
        texts, heads = self._counts.shape
        grouped = query.reshape(texts * heads, -1, 1, query.shape[-1])
        key, value = (x.expand(texts * heads, 1, *x.shape) for x in (self._key, self._value))
        index = self._index[:, :, : self._most]
        output, _ = decode(grouped, key, value, index, scale=scale)
        keys = self.rows
        width = (self._key.shape[-1] + self._value.shape[-1]) * self._key.element_size()
        read = Read(keys, keys * width, index.numel() * index.element_size())
        return output.reshape(*query.shape[:3], -1), read

    def past(self, query: Tensor, scale: float) -> State:
        """Over all rows of each head, for any number of queries."""
        key, value, _, exists = self._padded()
        if not key.shape[2]:
            output = query.new_zeros(*query.shape[:3], value.shape[-1])
            return output, torch.full(query.shape[:3], -torch.inf, device=query.device)
        bias = torch.zeros(exists.shape, device=key.device).masked_fill(~exists, -torch.inf)
        layout = every_pair(query, key.shape[2])
        found: State = attention(query, key, value, layout, scale=scale, key_bias=bias)
        return found

    def settle(self, query: Tensor, scale: float) -> None:
        """Evict again, from what was kept and the further prompt."""
        key, value, positions, exists = self._padded()
        self.evict(key, value, positions.masked_fill(~exists, -1), query, scale)

    def taken(self, texts: Tensor) -> Rows:
        """A copy that holds these texts."""
        found = EvictedRows(self.keeper)
        found._length, found.since = self._length, self.since
        key, value, positions, exists = (
            x.index_select(0, texts.to(x.device)) for x in self._padded()
        )
        found.pack(key, value, positions, exists)
        return found

    def check_crop(self, tokens: int) -> None:
        """Only tokens behind which nothing was given up can be taken back."""
        if tokens > self.since:
            raise UsageError(
                f"{self.keeper.method.card.name} has given up keys {self.since} tokens ago, so "
                f"{tokens} tokens cannot be taken back; reset the cache and give the shorter text"
            )

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens, which are the last of every head."""
        if not tokens:
            return
        self._counts = self._counts - tokens
        self._total -= tokens * self._counts.numel()
        self._most, self._free = self._most - tokens, self._free + tokens
        self._length, self.since = self._length - tokens, self.since - tokens
        column = torch.arange(self._index.shape[-1], device=self._index.device)
        beyond = column >= self._counts.flatten().unsqueeze(-1)
        self._index.masked_fill_(beyond.unsqueeze(1), -1)

    def tensors(self) -> dict[str, Tensor]:
        """Rows without room, and how many each head has."""
        key, value, positions, exists = self._padded()
        return {
            "key": key[exists], "value": value[exists], "counts": self._counts,
            "positions": positions[exists].to(torch.int32),
        }  # fmt: skip

    def _padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, positions and existence (texts, kv_heads, most, ...), by position."""
        lists = self._index[:, 0, : self._most].reshape(*self._counts.shape, -1).long()
        exists = lists >= 0
        far = torch.iinfo(torch.int32).max
        positions = self._positions[lists.clamp(min=0)].masked_fill(~exists, far)
        if self._turn:
            positions, order = positions.sort(dim=-1)
            lists = lists.gather(-1, order)
        at = lists.clamp(min=0)
        return self._key[at], self._value[at], positions.long(), exists
