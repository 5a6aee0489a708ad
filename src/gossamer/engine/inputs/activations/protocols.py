"""What the engine asks of methods that choose inputs. Each is found by the functions it has.

Methods of the topic `activations` that are used by `sparsify_activations` have the role
`input_scorer`. Scores become choices by a threshold that calibration reads off, or per token by
`gossamer.keep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from gossamer.core.activations import InputState, InputStats
from gossamer.core.card import Card
from gossamer.core.errors import UsageError


@runtime_checkable
class InputScorer(Protocol):
    """A method that gives every input of a linear layer a number; low is skipped."""

    @property
    def card(self) -> Card: ...

    @property
    def density(self) -> float:
        """The fraction of weights that a token reads, over all layers."""
        ...

    @property
    def per_token(self) -> bool:
        """Whether each token keeps the same number of inputs, rather than those above a threshold
        that holds for all tokens."""
        ...

    def prepare(self, weight: Tensor, stats: InputStats, density: float) -> InputState:
        """What one layer needs, from its weight (out, in).

        density: the fraction of the layer's weights that may be read. The same arguments give the
        same state, and so does the state's `facts` in place of `stats.sample`.
        """
        ...

    def score(self, x: Tensor, state: InputState) -> Tensor:
        """Scores (..., in) of inputs x (..., in), from 0; `state.score(x)` unless simulated."""
        ...


@runtime_checkable
class Allocates(InputScorer, Protocol):
    """A method that may give the layers of a block different densities."""

    @property
    def allocation(self) -> str:
        """`greedy`, by the error of the block's output, or `uniform`."""
        ...

    @property
    def step(self) -> float:
        """The sparsity that one greedy step adds to the largest layer of a block."""
        ...


@runtime_checkable
class Rotates(InputScorer, Protocol):
    """A method that turns the inputs of some layers before they are scored."""

    @property
    def turns(self) -> bool:
        """Whether it does so at all, as it is set."""
        ...

    def rotations(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Orthogonal matrices V (in, in) for those layers that are turned, of all with one input.

        Layers are then scored and multiplied with x V and W V. One tensor for several layers is
        multiplied once.
        """
        ...


@runtime_checkable
class ChecksLayers(InputScorer, Protocol):
    """A method that serves only models with layers of certain names."""

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise UsageError, before anything runs, where these layers do not suffice."""
        ...


@runtime_checkable
class NeuronSelector(Protocol):
    """A method that chooses, once a prompt has been read, the neurons that all later tokens use."""

    @property
    def card(self) -> Card: ...

    @property
    def density(self) -> float:
        """The fraction of neurons kept."""
        ...

    def serves(self, block: int, blocks: int) -> bool:
        """Whether a feed-forward network, by its place among all, is served at all."""
        ...

    def neurons(self, activations: Tensor) -> Tensor:
        """int64, ascending: neurons kept for one text, from the inputs (tokens, neurons) of the
        layer that leads out of the feed-forward network."""
        ...


def check_scorer(method: Any) -> None:
    """Raise UsageError unless `method` is an instance that chooses inputs or neurons."""
    if isinstance(method, type):
        raise UsageError(f"method is the class {method.__name__}; pass an instance of it")
    if not isinstance(getattr(method, "card", None), Card) or not isinstance(
        method, InputScorer | NeuronSelector
    ):
        raise UsageError(
            f"{type(method).__name__} chooses no inputs: gossamer methods activations lists the "
            "methods that do"
        )
