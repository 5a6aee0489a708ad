"""What the engine asks of methods that choose keys. Each is found by the functions it has.

Methods of the topic `attention` have the role `key_scorer`. One method may play in several phases:
choose pairs for a prompt, drop keys from the cache behind it, choose keys for each new token.
Scores become choices by `gossamer.keep`, whose budgets and protected units are shared by all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from gossamer.core.attention import AttentionCall, CachedKeys
from gossamer.core.card import Card
from gossamer.ops.attention import Layout


@runtime_checkable
class PairChooser(Protocol):
    """A method that chooses which pairs of queries and keys of a prompt are computed."""

    @property
    def card(self) -> Card: ...

    def layout(self, call: AttentionCall) -> Layout:
        """The pairs, for `call.queries` and `call.keys`; looks, and changes nothing.

        What lies behind a query's position may be listed and is not computed. Every query keeps
        one key at least. Called without gradients. Raises UsageError for a call that the method
        cannot serve, such as one that is not causal.
        """
        ...


@runtime_checkable
class LearnsFromPrompts(Protocol):
    """A method that is fitted to a model before it chooses."""

    @property
    def card(self) -> Card: ...

    def observe(self, call: AttentionCall) -> Any:
        """What is learned from one layer's call of one prompt; small, for many are kept."""
        ...

    def fitted(self, observed: Mapping[int, Sequence[Any]]) -> Any:
        """A new method, from what was observed in each layer."""
        ...


@runtime_checkable
class KeyEvictor(Protocol):
    """A method that says which keys stay in the cache when a prompt is over."""

    last: int
    """How many of the prompt's last queries it looks at."""

    @property
    def card(self) -> Card: ...

    def kept_keys(self, cached: CachedKeys) -> Tensor:
        """bool (kv_heads, rows): the keys that stay, at least one of each head that has one."""
        ...


@runtime_checkable
class RollingEvictor(KeyEvictor, Protocol):
    """One that also gives up a key for each new token, once a head holds `sinks + window`."""

    sinks: int
    window: int

    def rolls(self) -> bool:
        """Whether it does so."""
        ...


@runtime_checkable
class KeySelector(Protocol):
    """A method that chooses, for each new token, which pages of the cache are read.

    The engine keeps what `summarise` makes of each complete page, calls `score` with it, and reads
    the pages with the highest scores and the newest page, which is never left out.
    """

    @property
    def card(self) -> Card: ...

    @property
    def page(self) -> int:
        """How many keys are chosen together."""
        ...

    def summarise(self, pages: Tensor, layer: int) -> dict[str, Tensor]:
        """What is kept of pages (texts, kv_heads, pages, page, width), each tensor of shape
        (texts, kv_heads, pages, ...)."""
        ...

    def score(self, query: Tensor, summary: Mapping[str, Tensor], layer: int) -> Tensor:
        """(texts, kv_heads, pages) for queries (texts, heads, 1, width)."""
        ...

    def keys_read(self, length: int, layer: int, layers: int) -> int:
        """How many of a text's keys one token may read in a layer; at least a page, or all."""
        ...

    def check_model(self, heads: int, kv_heads: int, width: int, layers: int) -> None:
        """Raise UsageError for a model that it cannot serve."""
        ...
