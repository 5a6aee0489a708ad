"""Outer loops over training: prune and train again, in rounds, by the caller's own training.

The loop is a list of trainings. With a folder for checkpoints it writes after each what the next
one starts from, and gives the training a file of its own for what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gossamer.core.allocation import LayerInfo
from gossamer.core.errors import FormatError, UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.support import Support
from gossamer.engine.data import digest_model
from gossamer.engine.protocols import Recipe, TopologyMethod
from gossamer.engine.train.checkpoint import random_state, read_state, set_random_state, write_state
from gossamer.engine.train.distributed import unwrapped
from gossamer.engine.train.flops import expected_flops
from gossamer.engine.train.layers import TrainedLayer, unfrozen_layers

State: TypeAlias = dict[str, Tensor]
FILE = "rounds.safetensors"


@dataclass(frozen=True)
class RoundPart:
    """One training that a recipe asks for.

    Attributes
    ----------
    index : int
        The round. Round 0 is the dense one.
    member : int
        Which copy of the round. Copies differ by what the caller makes of it: a seed, a decay.
    first : int
        The step at which data order and learning rate go on.
    last : int or None
        The step to stop before. None for the end.
    checkpoint : Path or None
        Where to keep the state of this training, and to go on from if it is there. None where the
        recipe has no folder.
    """

    index: int
    member: int = 0
    first: int = 0
    last: int | None = None
    checkpoint: Path | None = None

    def steps(self, total: int) -> int:
        """How many steps this training takes of a schedule of `total`."""
        return (total if self.last is None else self.last) - self.first


@dataclass(frozen=True)
class RoundsResult:
    """What `train_rounds` left.

    Attributes
    ----------
    supports : dict of str to Support
        Of the last round.
    densities : tuple of float
        The share of kept weights after each round, from dense on.
    """

    supports: dict[str, Support]
    densities: tuple[float, ...]


def train_rounds(
    model: nn.Module,
    method: Recipe,
    train: Callable[[nn.Module, TopologyMethod, RoundPart], None],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: Sequence[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    checkpoint: str | Path | None = None,
) -> RoundsResult:
    """Train, prune and train again, in place: IMP and SparseModelSoups.

    Parameters
    ----------
    model : nn.Module
        Trained in place.
    method : Recipe
        Such as `gs.weights.IMP(density=0.05)`.
    train : callable
        `train(model, method, part)` trains the model inside `sparse_training(model, optimizer,
        method, ...)`, with the same include and exclude, an optimizer of its own, and the steps
        that `part` names.
    include, exclude : sequence of str
        As in `prune`.
    data : sequence of batches, optional
        Inputs on which batch norms take new statistics after averaging.
    evaluate : callable, optional
        A score of the model, higher is better. With it soups are greedy.
    checkpoint : path, optional
        A folder. The same call on the same initial model goes on there after a kill, at the
        training that was running. It goes on within it where `train` keeps its state in
        `part.checkpoint`.

    Returns
    -------
    RoundsResult
        The last support, and the density after each round.

    Raises
    ------
    UsageError
        Where averaging meets a batch norm and there is no data, where `train` moved a weight
        outside the support, and where the folder belongs to another recipe.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> def train(model, method, part):
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     with gs.sparse_training(model, optimizer, method, total_steps=10):
    ...         for _ in range(part.steps(10)):
    ...             model(torch.randn(16, 64)).square().mean().backward()
    ...             optimizer.step()
    ...             optimizer.zero_grad()
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 10))
    >>> gs.train_rounds(model, gs.weights.IMP(density=0.25, rounds=2), train).densities
    (1.0, 0.5, 0.25)
    """
    inner, _ = unwrapped(model)
    layers = unfrozen_layers(inner, include, exclude)
    if method.members > 1 and data is None and _has_statistics(inner):
        raise UsageError(
            "averaged weights need new batch norm statistics: pass data=, batches of inputs"
        )
    loop = _Loop(inner, method, layers, None if checkpoint is None else Path(checkpoint))
    loop.open()
    for part in parts_of(method)[loop.done :]:
        loop.begin(part)
        train(model, method.keep_masks(loop.masks), loop.with_checkpoint(part))
        if part.index:
            _check_zeros(layers, loop.masks)
            loop.members.append(_copy(inner))
            if part.member == method.members - 1:
                if len(loop.members) > 1:
                    _average(inner, loop.members, data, evaluate)
                loop.densities.append(loop.density())
        loop.end()
    masks = loop.masks
    supports = {n: Support(m, Unstructured(), float(m.double().mean())) for n, m in masks.items()}
    return RoundsResult(supports, tuple(loop.densities))


def parts_of(method: Recipe) -> list[RoundPart]:
    """Every training of the loop, in order."""
    first = method.rewind or 0
    dense = [RoundPart(0, last=first)] * bool(first) + [RoundPart(0, first=first)]
    rounds = range(1, method.rounds + 1)
    return dense + [RoundPart(i, m, first) for i in rounds for m in range(method.members)]


def expected_rounds_flops(
    model: nn.Module,
    method: Recipe,
    steps: int,
    forward: Callable[[nn.Module], Tensor],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> float:
    """What all trainings of the loop would cost together, each up to step `steps`.

    Supports are those of the weights as they are now; training moves density between layers, so
    the real cost differs where layers cost differently.
    """
    layers = unfrozen_layers(unwrapped(model)[0], include, exclude)
    masks = {x.name: torch.ones_like(x.matrix(x.weight), dtype=torch.bool) for x in layers}
    latency = []
    for index in range(method.rounds + 1):
        if index:
            masks = method.prune(_infos(layers), masks, index)
        latency.append(
            expected_flops(
                model, method.keep_masks(masks), 1, forward, include=include, exclude=exclude
            )
        )
    return sum(latency[part.index] * part.steps(steps) for part in parts_of(method))


class _Loop:
    """Where a loop stands, between two of its trainings."""

    def __init__(
        self,
        model: nn.Module,
        method: Recipe,
        layers: list[TrainedLayer],
        folder: Path | None,
    ) -> None:
        self.model, self.method, self.layers, self.folder = model, method, layers, folder
        self.done = 0
        self._facts: dict[str, Any] = {}
        self.masks = {x.name: torch.ones_like(x.matrix(x.weight), dtype=torch.bool) for x in layers}
        self.densities = [1.0]
        self.members: list[State] = []
        self.early: State = {}
        self.pruned: State = {}

    def begin(self, part: RoundPart) -> None:
        """Put the model where this training starts."""
        if part.index == 0:
            if part.last is None:
                self.early = _copy(self.model)
            return
        if part.member == 0:
            self.masks = self.method.prune(_infos(self.layers), self.masks, part.index)
            if self.method.rewind is not None:
                self.model.load_state_dict(self.early)
            _apply(self.layers, self.masks)
            self.pruned, self.members = _copy(self.model), []
        self.model.load_state_dict(self.pruned)

    def end(self) -> None:
        """Count the training, and write where the loop stands."""
        self.done += 1
        self._write()
        if self.folder is not None:
            self._part_file(self.done - 1).unlink(missing_ok=True)

    def with_checkpoint(self, part: RoundPart) -> RoundPart:
        """The part with the file of its own."""
        file = None if self.folder is None else self._part_file(self.done)
        return replace(part, checkpoint=file)

    def density(self) -> float:
        """The share of weights in the support."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return kept / sum(mask.numel() for mask in self.masks.values())

    def open(self) -> None:
        """Go on from the folder; without one there, begin it."""
        if self.folder is None:
            return
        file = self.folder / FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        self._facts = {
            "method": repr(self.method),
            "layers": [x.name for x in self.layers],
            "initial weights": digest_model(self.model),
            "torch": str(torch.__version__),
        }
        if not file.exists():
            self._write()
            return
        state = read_state(file)
        if state.get("facts") != self._facts:
            raise UsageError(
                f"{file} belongs to another method, initial model or torch; choose another folder"
            )
        device = {x.name: x.weight.device for x in self.layers}
        try:
            self.done, self.densities = state["done"], state["densities"]
            self.masks = {name: mask.to(device[name]) for name, mask in state["masks"].items()}
            self.early, self.pruned = state["early"], state["pruned"]
            self.members = state["members"]
            self.model.load_state_dict(state["model"])
            set_random_state(state["random"])
        except (KeyError, TypeError, RuntimeError):
            raise FormatError(f"{file}: damaged; delete its folder and start again") from None

    def _write(self) -> None:
        if self.folder is None:
            return
        state = {
            "facts": self._facts, "done": self.done, "densities": self.densities,
            "masks": self.masks, "early": self.early, "pruned": self.pruned,
            "members": self.members, "model": self.model.state_dict(), "random": random_state(),
        }  # fmt: skip
        write_state(self.folder / FILE, state)

    def _part_file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{number}.safetensors"


def _average(
    model: nn.Module,
    members: list[State],
    data: Sequence[Any] | None,
    evaluate: Callable[[nn.Module], float] | None,
) -> None:
    """Put the soup into the model: all members, or greedily those that do not make it worse."""

    def cook(chosen: list[State]) -> None:
        model.load_state_dict(_mean(chosen))
        if data is not None and len(chosen) > 1:
            update_bn(data, model)

    if evaluate is None:
        cook(members)
        return
    scores = []
    for state in members:
        model.load_state_dict(state)
        scores.append(evaluate(model))
    order = sorted(range(len(members)), key=lambda i: -scores[i])
    chosen, best = [members[order[0]]], scores[order[0]]
    for i in order[1:]:
        cook([*chosen, members[i]])
        score = evaluate(model)
        if score >= best:
            chosen.append(members[i])
            best = score
    cook(chosen)


def _mean(states: list[State]) -> State:
    """The mean of floating tensors, summed in float64; counters as in the first state."""
    out = {}
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            total = torch.stack([state[name].double() for state in states]).mean(0)
            tensor = total.to(tensor.dtype)
        out[name] = tensor
    return out


def _infos(layers: Sequence[TrainedLayer]) -> list[LayerInfo]:
    return [LayerInfo(x.name, tuple(x.weight.shape), x.block, x.matrix(x.weight)) for x in layers]


@torch.no_grad()
def _apply(layers: Sequence[TrainedLayer], masks: dict[str, Tensor]) -> None:
    for layer in layers:
        layer.weight.masked_fill_(~layer.tensor(masks[layer.name]), 0)


def _check_zeros(layers: Sequence[TrainedLayer], masks: dict[str, Tensor]) -> None:
    for layer in layers:
        if bool(layer.matrix(layer.weight)[~masks[layer.name]].any()):
            raise UsageError(
                f"{layer.name}: train() moved weights outside the support; step inside "
                "gs.sparse_training(model, optimizer, method, ...) with the method it is given"
            )


def _copy(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _has_statistics(model: nn.Module) -> bool:
    return any(getattr(m, "running_mean", None) is not None for m in model.modules())
