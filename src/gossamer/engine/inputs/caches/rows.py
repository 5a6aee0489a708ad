"""What a layer of a cache keeps of its texts: the part that methods differ in.

A layer takes prompts densely. Once the first single token comes, the prompt is over and goes into
`Rows`, of which there are several kinds: evicted, selected, compressed. All texts of one `Rows`
have the same length and no padding; the layer makes one for each text of a batch with padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.ops.attention import State, attention
from gossamer.ops.attention.layout import Layout


@dataclass(frozen=True)
class Read:
    """What one token's attention read, summed over texts and heads of keys."""

    keys: int = 0
    bytes: int = 0
    """Of keys and values, or what stands for them."""
    choosing: int = 0
    """Bytes read to choose them."""

    def __add__(self, other: Read) -> Read:
        return Read(
            self.keys + other.keys, self.bytes + other.bytes, self.choosing + other.choosing
        )


@dataclass(frozen=True)
class Shape:
    """What one token gives to a layer: heads of keys, widths of key and value, and their dtype."""

    kv_heads: int
    key: int
    value: int
    dtype: torch.dtype

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> Shape:
        """Of (texts, kv_heads, tokens, width)."""
        return cls(key.shape[1], key.shape[3], value.shape[3], key.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one token."""
        return self.kv_heads * (self.key + self.value) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a layer holds when a prompt is over.

    Attributes
    ----------
    query : Tensor
        (texts, heads, n, width): the last queries, as many as the keeper's `last`, or fewer.
    key, value : Tensor
        (texts, kv_heads, length, width), without padding.
    scale : float
        Factor of the products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


class Rows(ABC):
    """Keys and values of texts of one length, kept by one method. Changed in place."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of each text, those given up included."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, with all that belongs to them."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Keys held, summed over texts and heads of keys."""

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens behind the last: (texts, kv_heads, new, width)."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Of what it was given."""

    @abstractmethod
    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Read]:
        """The output (texts, heads, 1, value width) of the newest token, which was added before."""

    @abstractmethod
    def past(self, query: Tensor, scale: float) -> State:
        """The attention of any number of queries over all rows, which lie before them."""

    @abstractmethod
    def settle(self, query: Tensor, scale: float) -> None:
        """A further prompt is over, whose tokens were added and whose last queries these are."""

    @abstractmethod
    def taken(self, texts: Tensor) -> Rows:
        """A copy that holds these texts, which may repeat."""

    @abstractmethod
    def check_crop(self, tokens: int) -> None:
        """Raise UsageError where so many tokens cannot be taken back exactly."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Take the newest tokens back, after `check_crop`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that `Keeper.restore` needs, without room to spare."""

    def whole(self) -> tuple[Tensor, Tensor] | None:
        """Every key and value (texts, kv_heads, length, width), where nothing was given up."""
        return None


class Keeper(ABC):
    """Makes the rows of one layer."""

    last: int = 0
    """How many of a prompt's last queries are remembered for it."""
    croppable: bool = False
    """Whether tokens can be taken back at any time."""

    @abstractmethod
    def start(self, prompt: Prompt) -> Rows:
        """The rows of texts whose first prompt is over; it may have no token."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], texts: int, length: int) -> Rows:
        """From `Rows.tensors`, read from a file; raises FormatError where they do not fit."""


def every_pair(query: Tensor, keys: int) -> Layout:
    """All queries (texts, heads, queries, width) by all keys."""
    queries = query.shape[2]
    shape = (-(-queries // 64), -(-keys // 64))
    blocks = torch.ones(shape, dtype=torch.bool, device=query.device)
    return Layout.from_blocks(blocks, queries, keys)


def causal_state(query: Tensor, key: Tensor, value: Tensor, scale: float) -> State:
    """The attention of new tokens to each other."""
    layout = every_pair(query, key.shape[2])
    found: State = attention(query, key, value, layout, causal=True, scale=scale)
    return found
