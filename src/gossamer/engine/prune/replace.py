"""Putting cheaper layers in the places of ordinary ones, and taking them back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.core.density import check_density
from gossamer.core.errors import UsageError
from gossamer.core.matrix import Weight, own_forward
from gossamer.core.result import LayerRecord, LeftOut
from gossamer.core.stats import LayerStats
from gossamer.engine import hooks
from gossamer.engine.data import Batch, read_batches
from gossamer.engine.protocols import Replacer
from gossamer.engine.prune.calibrate import STATISTICS, Calibrator
from gossamer.engine.prune.channels import obstacle
from gossamer.engine.prune.plan import UNREACHED
from gossamer.models import choose_weights, find_blocks, find_weights
from gossamer.nn.foldable import Foldable


@dataclass(frozen=True, eq=False)
class ReplaceLayersResult:
    """What `replace_layers` did.

    Parameters
    ----------
    model : nn.Module
        The given model, with the new layers.
    method : str
        The name of the method.
    layers : tuple of LayerRecord
        One for each new layer. Its density is the number of its weights over that of the matrix it
        replaced; biases are left out.
    errors : mapping of str to float
        By layer the norm of the change of its weight over the norm of the old weight; infinite
        where the layer cannot be folded.
    left_out : tuple of LeftOut
        Every other matrix that could be pruned, with the reason.
    requested_density : float
        The density asked for.
    """

    model: nn.Module
    method: str
    layers: tuple[LayerRecord, ...]
    errors: Mapping[str, float]
    left_out: tuple[LeftOut, ...]
    requested_density: float

    @property
    def measured_density(self) -> float:
        """Weights of the new layers over those of the old ones."""
        sizes = [math.prod(x.shape) for x in self.layers]
        return sum(x.density * n for x, n in zip(self.layers, sizes, strict=True)) / sum(sizes)

    def __repr__(self) -> str:
        """One line, without the model."""
        return (
            f"ReplaceLayersResult({type(self.model).__name__}: {self.method}, "
            f"{len(self.layers)} layers at density {self.measured_density:.4f}, "
            f"{len(self.left_out)} left)"
        )


def replace_layers(
    model: nn.Module,
    method: Replacer,
    *,
    density: float,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: Iterable[Batch] | None = None,
    seed: int = 0,
) -> ReplaceLayersResult:
    """Replace linear layers of `model` in place by cheaper ones.

    Parameters
    ----------
    model : nn.Module
        Its optimizer must be made afterwards, for the parameters are new.
    method : Replacer
        Such as `gs.weights.Monarch()`.
    density : float
        Weights of a new layer over those of the old one, in (0, 1]; an upper bound.
    include, exclude : sequence of str
        As in `prune`.
    data : iterable of batches, optional
        For a method that needs statistics of the layers' inputs.
    seed : int
        Of what the method draws.

    Returns
    -------
    ReplaceLayersResult
        What was replaced, and what was left and why.

    Raises
    ------
    UsageError
        Before anything changes: for a density that the method cannot meet in some layer, missing
        data, and a model without a layer to replace.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> result = gs.replace_layers(model, gs.weights.Monarch(), density=0.5)
    >>> type(model[0]).__name__
    'MonarchLinear'
    """
    if isinstance(method, type) or not isinstance(method, Replacer):
        raise UsageError(f"{method!r} is not an instance of a method that replaces layers")
    density = check_density(density)
    chosen, left = _chosen(model, include, exclude)
    stats = _stats(model, method, chosen, data)
    generator = torch.Generator().manual_seed(seed)
    new: dict[str, nn.Module] = {}
    for name, weight in chosen.items():
        layer = weight.module
        assert isinstance(layer, nn.Linear)
        new[name] = method.replace(layer, stats[name], density, generator)
        new[name].train(layer.training).requires_grad_(layer.weight.requires_grad)
    errors = {name: _error(chosen[name].module, layer) for name, layer in new.items()}
    records = tuple(_record(name, chosen[name].module, new[name], density) for name in new)
    _put(model, {id(chosen[name].module): layer for name, layer in new.items()})
    return ReplaceLayersResult(model, method.card.name, records, errors, left, density)


def fold_layers(model: nn.Module) -> tuple[str, ...]:
    """Turn what `replace_layers` made into Linear layers again.

    Outputs agree to rounding. The parameters are new, so the optimizer must be made anew.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Returns
    -------
    tuple of str
        The names of the layers.

    Raises
    ------
    UsageError
        Where the model itself is such a layer: call its own `fold()`.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> _ = gs.replace_layers(model, gs.weights.Monarch(), density=0.5)
    >>> gs.fold_layers(model)
    ('0',)
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, Foldable)}
    if "" in found:
        raise UsageError("the model itself is a layer that folds; call its fold()")
    _put(model, {id(module): module.fold() for module in found.values()})
    return tuple(found)


def _chosen(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, Weight], tuple[LeftOut, ...]]:
    """The layers that can be replaced, and why others stay."""
    choice = choose_weights(model, include, exclude)
    reasons, chosen = dict(choice.left), {}
    for name, weight in choice.weights.items():
        module = weight.module
        reason = f"a {type(module).__name__}; only Linear layers are replaced"
        if isinstance(module, nn.Linear):
            reason = own_forward(module) or obstacle(module)
        if not name:
            reason = "the model itself; put it into a Sequential to replace it"
        if reason and name in choice.named:
            raise UsageError(f"{name}: cannot be replaced: {reason}")
        if reason:
            reasons[name] = reason
        else:
            chosen[name] = weight
    if not chosen:
        name, reason = next(iter(reasons.items()))
        raise UsageError(f"{type(model).__name__} has no layer to replace: {name} is {reason}")
    every = find_weights(model)
    left = tuple(
        LeftOut(name, type(every[name].module).__name__, every[name].tensor.numel(), reason)
        for name, reason in reasons.items()
    )
    return chosen, left


def _stats(
    model: nn.Module, method: Replacer, chosen: Mapping[str, Weight], data: Iterable[Batch] | None
) -> dict[str, LayerStats]:
    """What the method needs to know of each layer's inputs, in the model as it is."""
    needs = method.card.needs
    if not needs:
        return {name: LayerStats(name, 0) for name in chosen}
    for need in needs:
        if need not in STATISTICS:
            raise UsageError(f"{method.card.name} needs {need}, which calibration does not gather")
    if data is None:
        raise UsageError(f"{method.card.name} needs calibration data: pass data=batches")
    with hooks.evaluating(model):
        calibrator = Calibrator(model, find_blocks(model), chosen, read_batches(data))
        found = calibrator.gather(chosen, None, needs)
    for name in chosen:
        if name not in found:
            raise UsageError(f"{name}: {UNREACHED}; give data that does, or exclude it")
    return found


@torch.no_grad()
def _error(old: nn.Module, new: nn.Module) -> float:
    if not isinstance(new, Foldable):
        return math.inf
    assert isinstance(old, nn.Linear)
    weight = old.weight.double()
    change = float((new.fold().weight.double() - weight).norm())
    return change / float(weight.norm()) if bool(weight.any()) else change


def _record(name: str, old: nn.Module, new: nn.Module, density: float) -> LayerRecord:
    weight = old.weight
    assert isinstance(weight, nn.Parameter)
    counts = [p.numel() for key, p in new.named_parameters() if key != "bias"]
    share = sum(counts) / weight.numel()
    return LayerRecord(name, tuple(weight.shape), share, density)


def _put(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Exchange modules by their identity, under every name that they have."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                parent._modules[key] = new[id(child)]
