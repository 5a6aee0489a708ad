"""What the engine asks of methods and allocations, which it takes as arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Pattern
from gossamer.core.stats import LayerStats
from gossamer.core.support import Support


class Method(Protocol):
    """What every pruning method has."""

    @property
    def card(self) -> Card: ...
    @property
    def default_pattern(self) -> Pattern: ...


@runtime_checkable
class Scorer(Protocol):
    """A method that gives every weight a number; low is removed."""

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Scores of the weight's shape (out, in)."""
        ...


@runtime_checkable
class Solver(Protocol):
    """A method that chooses and repairs together."""

    def solve(
        self, weight: Tensor, stats: LayerStats, pattern: Pattern, density: float
    ) -> tuple[Tensor, Support]:
        """The new weight (out, in) and its support."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """A method that chooses supports while the model trains. Pure functions over plain data.

    Every weight, gradient and mask is a matrix (out, in) laid out as `core.matrix.as_matrix`, by
    layer name. Steps count optimizer steps taken, from 1; `total` is how many there will be.
    """

    dense: ClassVar[bool]
    """Whether weights outside the support live on behind it and receive gradients."""
    gradients_at_start: ClassVar[bool]
    """Whether `start` needs the gradients of one loss."""
    gradients_at_update: ClassVar[bool]
    """Whether `update` needs the gradients of all weights, kept or not."""
    shrinks: ClassVar[bool]
    """Whether `shrink` is called after every step, before `update`."""
    owns: ClassVar[bool]
    """Whether it keeps a tensor of its own for each layer: it is handed to every function as
    `LayerInfo.own`, may learn from each step's gradients, and is saved with the run."""
    scales: ClassVar[bool]
    """Whether it makes the scales of batch norms sparse, as matrices (channels, 1), rather than
    the weights of layers."""

    @property
    def card(self) -> Card: ...
    @property
    def pattern(self) -> Pattern: ...

    def start(
        self,
        layers: Sequence[LayerInfo],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The first masks."""
        ...

    def due(self, step: int, total: int) -> bool:
        """Whether supports may change after this step."""
        ...

    def update(
        self,
        step: int,
        total: int,
        layers: Sequence[LayerInfo],
        gradients: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> list[dict[str, Tensor]]:
        """The supports to pass through, in order. What leaves one and enters the next starts
        anew from zero; what stays in all of them keeps its value and its optimizer state."""
        ...

    def shrink(
        self, step: int, total: int, layers: Sequence[LayerInfo], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """New values for the weights of some layers, by name."""
        ...

    def refine(self, layer: LayerInfo, gradient: Tensor, mask: Tensor) -> Tensor:
        """The gradient that the optimizer is given, of a method that is `dense` or `owns`."""
        ...

    def own(self, layers: Sequence[LayerInfo], generator: torch.Generator) -> dict[str, Tensor]:
        """The first tensors of a method that `owns`, right after `start`."""
        ...

    def learn(self, layer: LayerInfo, gradient: Tensor, mask: Tensor) -> Tensor:
        """The layer's own tensor after this step, from the weights and gradients before it."""
        ...


@runtime_checkable
class Rounds(Protocol):
    """A method that trains, prunes and trains again, in rounds."""

    @property
    def card(self) -> Card: ...
    @property
    def rounds(self) -> int:
        """How often the model is pruned."""
        ...

    @property
    def members(self) -> int:
        """How many copies are trained in a round and averaged."""
        ...

    @property
    def rewind(self) -> int | None:
        """The step of the dense training that each round starts from; None: the last round's end."""
        ...

    def prune(
        self, layers: Sequence[LayerInfo], masks: Mapping[str, Tensor], index: int
    ) -> dict[str, Tensor]:
        """The support of round `index`, from 1, out of the last one."""
        ...

    def hold(self, masks: Mapping[str, Tensor]) -> Trainer:
        """The trainer that keeps these masks."""
        ...


@runtime_checkable
class Rewirer(Protocol):
    """A training method whose decisions need the kept weights only, and of the others at most
    where the gradient is largest: it can work where no dense matrix exists."""

    growth: ClassVar[Literal["random", "gradient"]]
    """How weights outside are chosen. With "gradient" what was just dropped may stay after all;
    with "random" it returns only where nothing else is free."""

    @property
    def card(self) -> Card: ...

    def counts(self, layers: Sequence[LayerInfo]) -> dict[str, int]:
        """How many weights each layer keeps; looks at shapes alone."""
        ...

    def due(self, step: int, total: int) -> bool:
        """Whether supports may change after this step."""
        ...

    def stay(self, values: Tensor, step: int, total: int) -> Tensor:
        """bool (nnz,): which of a layer's kept weights survive the update after this step. As
        many as do not are grown."""
        ...


class Allocation(Protocol):
    """How one density becomes one per layer."""

    @property
    def needs_norm(self) -> bool: ...
    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]: ...


def check_method(method: Any, statistics: Sequence[str]) -> None:
    """Raise UsageError unless `method` is a method that needs no more than `statistics`."""
    if isinstance(method, type):
        raise UsageError(f"method is the class {method.__name__}; pass an instance of it")
    card = getattr(method, "card", None)
    if not isinstance(card, Card) or not isinstance(method, (Scorer, Solver)):
        raise UsageError(
            f"{type(method).__name__} is not a pruning method: it needs a card and either "
            "score(weight, stats) or solve(weight, stats, pattern, density)"
        )
    for need in card.needs:
        if need not in statistics:
            raise UsageError(f"{card.name} needs {need}, which calibration does not gather")
