"""What the engine asks of methods and allocations, which it takes as arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.pattern import Pattern
from gossamer.core.stats import LayerStats
from gossamer.core.step import Step
from gossamer.core.support import Support
from gossamer.core.width import Width


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
class Wraps(Solver, Protocol):
    """A solver that goes on from what another scorer or solver chose.

    The engine gathers what both need, and admits the patterns that both admit. The solver hands
    pattern and density on.
    """

    @property
    def start(self) -> Any:
        """The method to start from."""
        ...


@runtime_checkable
class Reports(Solver, Protocol):
    """A solver that tells what it did in each layer; the figures become part of the result."""

    def solve_and_report(
        self, weight: Tensor, stats: LayerStats, pattern: Pattern, density: float
    ) -> tuple[Tensor, Support, Mapping[str, float]]:
        """What `solve` gives, and figures by name."""
        ...


@runtime_checkable
class TopologyMethod(Protocol):
    """A method that chooses supports while the model trains. Pure functions over plain data.

    Every weight, gradient and mask is a matrix (out, in) laid out as `core.matrix.as_matrix`, by
    layer name. What a method does beside choosing supports is found by the functions it has:
    `EditsGradient`, `EditsWeights`, `FreezesWeights`, `KeepsState`, `StartsNewcomers`,
    `CompressedTopology`. `Step.gradients` serves those whose card needs `gradients`.
    """

    keeps_dense_weights: ClassVar[bool]
    """Whether weights outside the support live on behind it and receive gradients."""
    trains_scales: ClassVar[bool]
    """Whether it makes the scales of batch norms sparse, as matrices (channels, 1), rather than
    the weights of layers."""

    @property
    def card(self) -> Card: ...
    @property
    def pattern(self) -> Pattern: ...

    def start(self, step: Step) -> dict[str, Tensor]:
        """The first masks."""
        ...

    def due(self, number: int, total: int, /) -> bool:
        """Whether supports may change after this step."""
        ...

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The supports to pass through, in order. What leaves one and enters the next starts
        anew from zero, or from `newcomers`; what stays in all of them keeps its value and its
        optimizer state."""
        ...


@runtime_checkable
class EditsGradient(Protocol):
    """A topology method that changes the gradients before each step of the optimizer."""

    def edit_gradient(self, step: Step, layer: LayerInfo, gradient: Tensor) -> Tensor:
        """The gradient that the optimizer is given; `step` is the one that comes."""
        ...


@runtime_checkable
class EditsWeights(Protocol):
    """A topology method that changes weights after each step of the optimizer."""

    def edit_weights(self, step: Step) -> dict[str, Tensor]:
        """New weights of some layers, by name; called before `update`."""
        ...


@runtime_checkable
class FreezesWeights(Protocol):
    """A topology method that holds some weights still, whatever momentum and decay do."""

    def frozen(self, step: Step) -> dict[str, Tensor]:
        """bool (out, in) by layer: the weights that keep their values bit for bit in the step
        that comes."""
        ...


@runtime_checkable
class KeepsState(Protocol):
    """A topology method with tensors of its own for each layer, which are saved with the run.

    It finds them as `LayerInfo.state`.
    """

    def first_state(self, step: Step) -> dict[str, dict[str, Tensor]]:
        """The first tensors by layer and name, right after `start`."""
        ...


@runtime_checkable
class LearnsState(KeepsState, Protocol):
    """A topology method whose tensors follow each step's gradients."""

    def next_state(self, step: Step, layer: LayerInfo, gradient: Tensor) -> dict[str, Tensor]:
        """The layer's tensors after the step that comes, from the weights and gradients before."""
        ...


@runtime_checkable
class StartsNewcomers(Protocol):
    """A topology method whose new weights do not start at zero."""

    def newcomers(self, count: int, generator: torch.Generator) -> Tensor:
        """float (count,): the values of what an update brings into a layer, in row order."""
        ...


@runtime_checkable
class CompressedTopology(TopologyMethod, Protocol):
    """A topology method that can also work where no dense matrix exists.

    Its decisions need the kept weights only, and of the others at most where the gradient is
    largest. `update` follows from `survivors`: as many weights are grown as do not survive. A
    method whose card needs `gradients` grows by them, and what was just dropped may stay after
    all. Others grow at random, and what was just dropped returns only where nothing else is free.
    """

    def counts(self, layers: Sequence[LayerInfo]) -> dict[str, int]:
        """How many weights each layer keeps; looks at shapes alone."""
        ...

    def survivors(self, values: Tensor, number: int, total: int) -> Tensor:
        """bool (nnz,): which of a layer's kept weights, in row order, survive the update after
        this step."""
        ...


@runtime_checkable
class Recipe(Protocol):
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

    def keep_masks(self, masks: Mapping[str, Tensor]) -> TopologyMethod:
        """The method that trains under these masks."""
        ...


@runtime_checkable
class LearnedMask(Protocol):
    """A method whose masks are modules through which layers see their weights in training.

    Each mask is registered as a torch parametrization of one layer. Its parameters join the
    user's optimizer as a group of their own.
    """

    freezes: ClassVar[bool]
    """Whether masks alone learn: every parameter of the model rests meanwhile."""

    @property
    def card(self) -> Card: ...
    @property
    def pattern(self) -> Pattern: ...

    @property
    def rate(self) -> float | None:
        """The learning rate of the masks' parameters; None for the optimizer's default."""
        ...

    def mask(self, layer: LayerInfo, step: Step) -> nn.Module:
        """The `Mask` of one layer, before the first step."""
        ...


@runtime_checkable
class Mask(Protocol):
    """What the module that `LearnedMask.mask` returns can do, beside what every module can.

    All that it keeps is a parameter or a buffer. In training mode the forward may be soft. In
    evaluation mode it gives what will remain after `finish`.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight (out, in), of the weight's dtype."""
        ...

    def advance(self, step: Step) -> None:
        """Follow the schedule; called before the first step, as number 0, and after each."""
        ...

    def finish(self, weight: Tensor) -> Support:
        """The kept weights, if training ended now; changes nothing."""
        ...


@runtime_checkable
class AddsLoss(Protocol):
    """A mask with a term of the loss of its own. The engine adds its gradient once a step."""

    def loss(self, weight: Tensor) -> Tensor:
        """A scalar, of the weight (out, in) and the mask's parameters."""
        ...


@runtime_checkable
class GradientSource(Protocol):
    """A method that estimates gradients from values of the loss, without a backward pass.

    The engine holds what it chose and drew, and sees to it that every query of a step sees the same
    batch, random numbers and buffers.
    """

    @property
    def card(self) -> Card: ...

    def due(self, number: int, total: int, /) -> bool:
        """Whether coordinates are chosen anew after so many steps; before the first they are."""
        ...

    def coordinates(
        self, parameters: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """bool, of each parameter's shape: what is estimated until the next choice."""
        ...

    def queries(self, coordinates: Mapping[str, Tensor], /) -> int:
        """How many times `estimate` asks for the loss."""
        ...

    def estimate(
        self,
        loss: Callable[[], float],
        parameters: Mapping[str, Tensor],
        coordinates: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The gradient of each parameter, zero outside the coordinates.

        The first call of `loss` is with the parameters as they are. They may be changed in place,
        and are left as they were, bit for bit.
        """
        ...


@runtime_checkable
class Replacer(Protocol):
    """A method that puts a cheaper layer in the place of an ordinary one."""

    @property
    def card(self) -> Card: ...

    def replace(
        self, layer: nn.Linear, stats: LayerStats, density: float, generator: torch.Generator
    ) -> nn.Module:
        """A layer with the same inputs and outputs, with at most `density` times the weights.

        The given layer stays as it is. Raises UsageError, naming `stats.name`, for a density that
        the method cannot meet.
        """
        ...


@runtime_checkable
class Planner(Protocol):
    """A method that says which coupled units of a transformer block stay."""

    @property
    def card(self) -> Card: ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it cuts: `neurons`, `heads`."""
        ...

    def keep(self, width: Width, count: int) -> Tensor:
        """bool (width.units,): the `count` units that stay."""
        ...


class Allocation(Protocol):
    """How one density becomes one per layer."""

    @property
    def needs(self) -> Sequence[str]:
        """What the dense model must be asked: `norm`, `angle`."""
        ...

    def allocate(self, layers: Sequence[LayerInfo], density: float) -> dict[str, float]: ...
