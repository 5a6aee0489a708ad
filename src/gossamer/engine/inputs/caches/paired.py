"""Keys and values that grow, each key beside its value, in memory for scattered reading."""

from __future__ import annotations

from torch import Tensor

from gossamer.ops.attention import room

_ROOM = 64


class GrownPair:
    """(texts, kv_heads, length, width) of both; adding is O(new), amortised. See `ops.attention.room`."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.length = 0
        self._key, self._value = key[:, :, :0], value[:, :, :0]
        self.append(key, value)

    @property
    def key(self) -> Tensor:
        """What was added, as a view; read it before the next change."""
        return self._key[:, :, : self.length]

    @property
    def value(self) -> Tensor:
        """The same of values."""
        return self._value[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes held, the room to spare included."""
        whole = self._key.untyped_storage().nbytes()
        shared = whole == self._value.untyped_storage().nbytes()
        return whole if shared else whole + self._value.untyped_storage().nbytes()

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add behind the last."""
        end = self.length + key.shape[2]
        if end > self._key.shape[2]:
            self._grow(end + max(_ROOM, end // 8) if self.length else end, key, value)
        self._key[:, :, self.length : end] = key
        self._value[:, :, self.length : end] = value
        self.length = end

    def crop(self, length: int) -> None:
        """Forget what lies behind."""
        self.length = length

    def _grow(self, tokens: int, key: Tensor, value: Tensor) -> None:
        shape = (key.shape[0], key.shape[1], tokens)
        if key.is_cpu:
            larger = room(shape, key.shape[3], value.shape[3], key.dtype)
        else:
            larger = key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3])
        for to, now in zip(larger, (self.key, self.value), strict=True):
            to[:, :, : self.length] = now
        self._key, self._value = larger
