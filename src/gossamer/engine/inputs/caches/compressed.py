"""Rows of which a method keeps few entries, in bitmap tiles; the newest tokens stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import FormatError, UsageError
from gossamer.engine.inputs.caches.grown import Grown
from gossamer.engine.inputs.caches.rows import Keeper, Prompt, Read, Rows, Shape
from gossamer.ops.attention import State
from gossamer.ops.kv_tiles import Tiles, decode, pack


@runtime_checkable
class KeyCompressor(Protocol):
    """A method that says which entries of cached keys and values stay."""

    @property
    def card(self) -> Card: ...

    @property
    def tail(self) -> int:
        """Newest tokens that stay dense."""
        ...

    @property
    def every(self) -> int:
        """Tokens that are compressed at once, a multiple of 64."""
        ...

    def kept_entries(self, x: Tensor, keys: bool) -> Tensor:
        """bool, the shape of x (texts, kv_heads, tokens, width), which are keys or values."""
        ...


class CompressingKeeper(Keeper):
    """Makes rows whose older tokens are compressed."""

    def __init__(self, method: KeyCompressor, layer: int, layers: int) -> None:
        self.method = method

    def start(self, prompt: Prompt) -> Rows:
        """All of the first prompt, compressed up to the tail."""
        rows = CompressedRows(self, prompt.key[:, :, :0], prompt.value[:, :, :0], [])
        rows.append(prompt.key, prompt.value)
        return rows

    def restore(self, tensors: Mapping[str, Tensor], texts: int, length: int) -> Rows:
        """The rows of a file."""
        key, value = tensors["key"], tensors["value"]
        count = sum(name.startswith("keys.") for name in tensors) // 3
        parts = [
            (_tiles(tensors, f"keys.{i}.", key.shape[-1], True),
             _tiles(tensors, f"values.{i}.", value.shape[-1], False)) for i in range(count)
        ]  # fmt: skip
        held = key.shape[2] + sum(part.tokens for part, _ in parts) if key.dim() == 4 else -1
        if held != length or key.shape[0] != texts or key.shape[:3] != value.shape[:3]:
            raise FormatError(f"a cache of {texts} texts and {length} tokens: damaged file")
        for tiles, dense in [
            pair for part in parts for pair in zip(part, (key, value), strict=True)
        ]:
            fits = tiles.shape[:2] == dense.shape[:2] and tiles.entries.dtype == dense.dtype
            if not fits or len(tensors) != 2 + 6 * count:
                raise FormatError("a cache's tiles do not fit its dense tokens: damaged file")
        return CompressedRows(self, key, value, parts)


class CompressedRows(Rows):
    """Tiles of the older tokens, in parts, and the dense tokens behind them."""

    def __init__(
        self,
        keeper: CompressingKeeper,
        key: Tensor,
        value: Tensor,
        parts: list[tuple[Tiles, Tiles]],
    ) -> None:
        self.keeper = keeper
        self._key, self._value = Grown(key), Grown(value)
        self._parts = parts

    @property
    def length(self) -> int:
        """Tokens of each text."""
        return self._key.length + sum(key.tokens for key, _ in self._parts)

    @property
    def shape(self) -> Shape:
        """Of what it was given."""
        return Shape.of(self._key.used, self._value.used)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._tile_bytes + self._key.nbytes + self._value.nbytes

    @property
    def rows(self) -> int:
        """Keys held: all."""
        return self._key.used.shape[0] * self._key.used.shape[1] * self.length

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens, and compress all that the method asks for."""
        self._key.append(key)
        self._value.append(value)
        method = self.keeper.method
        count = max(0, self._key.length - method.tail) // method.every * method.every
        if not count:
            return
        pair = []
        for dense, keys in ((self._key.used, True), (self._value.used, False)):
            old = dense[:, :, :count]
            pair.append(pack(old, method.kept_entries(old, keys), keys=keys))
        self._parts.append((pair[0], pair[1]))
        self._key = Grown(self._key.used[:, :, count:])
        self._value = Grown(self._value.used[:, :, count:])

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Read]:
        """Over all of them, in one softmax."""
        output, _ = self.past(query, scale)
        return output, Read(self.rows, self._tile_bytes + self._dense_bytes)

    def past(self, query: Tensor, scale: float) -> State:
        """Over all rows."""
        keys, values = zip(*self._parts, strict=True) if self._parts else ((), ())
        return decode(query, keys, values, self._key.used, self._value.used, scale=scale)

    def settle(self, query: Tensor, scale: float) -> None:
        """Nothing: tokens were compressed as they came."""

    def taken(self, texts: Tensor) -> Rows:
        """A copy that holds these texts."""
        key, value = (x.used.index_select(0, texts) for x in (self._key, self._value))
        parts = [(one.select(texts), two.select(texts)) for one, two in self._parts]
        return CompressedRows(self.keeper, key, value, parts)

    def check_crop(self, tokens: int) -> None:
        """Only dense tokens can be taken back: those in tiles have lost entries."""
        if tokens > self._key.length:
            raise UsageError(
                f"{tokens} tokens cannot be taken back: {self._key.length} are dense, and the older "
                "ones are compressed"
            )

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens."""
        self._key.crop(self._key.length - tokens)
        self._value.crop(self._value.length - tokens)

    def tensors(self) -> dict[str, Tensor]:
        """The dense tokens, and bitmaps, offsets and entries of each part."""
        found = {"key": self._key.used.contiguous(), "value": self._value.used.contiguous()}
        for i, both in enumerate(self._parts):
            for name, tiles in zip(("keys", "values"), both, strict=True):
                for part in ("bitmaps", "offsets", "entries"):
                    found[f"{name}.{i}.{part}"] = getattr(tiles, part)
        return found

    @property
    def _tile_bytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self._parts)

    @property
    def _dense_bytes(self) -> int:
        return self._key.used.nbytes + self._value.used.nbytes


def _tiles(tensors: Mapping[str, Tensor], prefix: str, width: int, keys: bool) -> Tiles:
    bitmaps, offsets, entries = (tensors[prefix + n] for n in ("bitmaps", "offsets", "entries"))
    return Tiles(bitmaps, offsets, entries, width, keys)
