"""Tensors that grow along their third axis without copying what they hold each time."""

from __future__ import annotations

import torch
from torch import Tensor

_ROOM = 64


class Grown:
    """(texts, heads, length, ...), with room behind the length: adding is O(new), amortised."""

    def __init__(self, first: Tensor) -> None:
        self.length = first.shape[2]
        self._data = first.clone(memory_format=torch.contiguous_format)

    @property
    def used(self) -> Tensor:
        """What was added, as a view; read it before the next change."""
        return self._data[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes held, the room included."""
        return self._data.untyped_storage().nbytes()

    def append(self, new: Tensor) -> None:
        """Add behind the last."""
        end = self.length + new.shape[2]
        if end > self._data.shape[2]:
            shape = list(self._data.shape)
            shape[2] = end + max(_ROOM, end // 8)
            larger = self._data.new_empty(shape)
            larger[:, :, : self.length] = self.used
            self._data = larger
        self._data[:, :, self.length : end] = new
        self.length = end

    def crop(self, length: int) -> None:
        """Forget what lies behind."""
        self.length = length

    def taken(self, texts: Tensor) -> Grown:
        """A copy that holds these texts, which may repeat."""
        return Grown(self.used.index_select(0, texts.to(self._data.device)))
