"""What the engine asks of methods that choose keys. Each is found by the functions it has.

Those of the topic `attention` that choose pairs of prompts have the role `key_scorer`. Those that
drop keys of a cache, or choose keys for each new token, have the role `cache`; a method may do both.
Those for diffusion models have the role `step_attention`.
Scores become choices by `gossamer.keep`, whose budgets and protected units are shared by all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from gossamer.core.attention import AttentionCall, CachedKeys
from gossamer.core.card import Card
from gossamer.core.denoising import Attended, DenoisingStep
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
class LearnsFromAnswers(PairChooser, Protocol):
    """A method that is fitted by what a model's own answers lose, before it chooses."""

    @property
    def answer(self) -> int:
        """Tokens of each answer, on which the loss is taken."""
        ...

    def observe_gradient(self, call: AttentionCall, gradient: Tensor) -> Any:
        """What is learned from one layer's call of one prompt with its answer, and the loss's
        gradient of the call's output (batch, heads, queries, width); small, for many are kept."""
        ...

    def fitted(self, observed: Mapping[int, Sequence[Any]]) -> Any:
        """A new method, from what was observed in each layer."""
        ...


@runtime_checkable
class KeyEvictor(Protocol):
    """A method that says which keys stay in the cache when a prompt is over."""

    @property
    def last(self) -> int:
        """How many of the prompt's last queries it looks at."""
        ...

    @property
    def card(self) -> Card: ...

    def kept_keys(self, cached: CachedKeys) -> Tensor:
        """bool (kv_heads, rows): the keys that stay, at least one of each head that has one."""
        ...


@runtime_checkable
class RollingEvictor(KeyEvictor, Protocol):
    """One that also gives up a key for each new token, once a head holds `sinks + window`."""

    @property
    def sinks(self) -> int: ...

    @property
    def window(self) -> int: ...

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


@runtime_checkable
class StepAttention(Protocol):
    """A method of attention inside diffusion models, which goes on from its own earlier steps.

    Its role is `step_attention`. A frozen value: the engine holds the state, one for each layer and
    branch, and forgets it when a new run begins.
    """

    @property
    def card(self) -> Card: ...

    def attend(self, call: AttentionCall, step: DenoisingStep, state: Any) -> Attended:
        """The output of one layer's call at one step, and the state for the next.

        `call` is not causal. Its keys are its queries' own tokens; only a method that says
        `autoregressive` is given keys of earlier frames before them. `call.layers` counts the
        layers seen so far. `state` is None in the first call of a run. Differentiable in query, key
        and value; the choice is not. Raises UsageError for a call that it cannot serve.
        """
        ...


@runtime_checkable
class LearnsFromSteps(StepAttention, Protocol):
    """A method of attention that is fitted to a diffusion model before it serves."""

    def observe_step(self, call: AttentionCall, step: DenoisingStep) -> Any:
        """What is learned from one call; small, for many are kept. The call itself runs dense."""
        ...

    def fitted(self, observed: Mapping[int, Sequence[Any]]) -> Any:
        """A new method, from what was observed in each layer."""
        ...
