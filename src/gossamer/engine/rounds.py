"""Outer loops over training: prune and train again, in rounds, by the caller's own training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gossamer.core.allocation import LayerInfo
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.support import Support
from gossamer.engine.protocols import Rounds, Trainer
from gossamer.engine.train_layers import TrainedLayer, unfrozen_layers

State: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One training that is asked for. Round 0 is the dense one; `member` counts its copies, which
    differ by what the caller makes of it (a seed, a decay). first: the step at which data order and
    learning rate go on. last: the step to stop before, or None for the end."""

    index: int
    member: int = 0
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class RoundsResult:
    """The support of the last round, and the share of kept weights after each, from dense on."""

    supports: dict[str, Support]
    densities: tuple[float, ...]


def train_rounds(
    model: nn.Module,
    method: Rounds,
    train: Callable[[nn.Module, Trainer, Part], None],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: Sequence[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> RoundsResult:
    """Run an outer loop (IMP, SparseModelSoups) over `train`, in place.

    train(model, trainer, part) trains the model inside `sparse_training(model, optimizer, trainer,
    ...)` with the same include and exclude, an optimizer of its own, and the steps that `part`
    names. data: batches of inputs on which batch norms take new statistics after averaging.
    evaluate: a score of the model, higher is better; with it soups are greedy.

    Raises UsageError where averaging meets a batch norm and there is no data, and where `train`
    moved a weight outside the support.
    """
    model = getattr(model, "_orig_mod", model)
    layers = unfrozen_layers(model, include, exclude)
    if method.members > 1 and data is None and _has_statistics(model):
        raise UsageError(
            "averaged weights need new batch norm statistics: pass data=, batches of inputs"
        )
    masks = {x.name: torch.ones_like(x.matrix(x.weight), dtype=torch.bool) for x in layers}
    first = method.rewind or 0
    if first:
        train(model, method.hold(masks), Part(0, last=first))
    early = _copy(model)
    train(model, method.hold(masks), Part(0, first=first))
    densities = [1.0]
    for index in range(1, method.rounds + 1):
        masks = method.prune(_infos(layers), masks, index)
        if method.rewind is not None:
            model.load_state_dict(early)
        _apply(layers, masks)
        start, members = _copy(model), []
        for member in range(method.members):
            model.load_state_dict(start)
            train(model, method.hold(masks), Part(index, member, first))
            _check_zeros(layers, masks)
            members.append(_copy(model))
        if len(members) > 1:
            _average(model, members, data, evaluate)
        kept = sum(int(mask.sum()) for mask in masks.values())
        densities.append(kept / sum(mask.numel() for mask in masks.values()))
    supports = {n: Support(m, Unstructured(), float(m.double().mean())) for n, m in masks.items()}
    return RoundsResult(supports, tuple(densities))


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
                "gs.sparse_training(model, optimizer, trainer, ...) with the trainer it is given"
            )


def _copy(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _has_statistics(model: nn.Module) -> bool:
    return any(getattr(m, "running_mean", None) is not None for m in model.modules())
