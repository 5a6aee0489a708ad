"""What Wanda should choose in one layer, computed the plain way over the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from families import Family
from rows import Wrong
from torch import Tensor, nn

import gossamer as gs

CLOSE = 1e-3
"""Scores nearer than this to each other may be ranked either way."""


def check(family: Family, layers: list[str]) -> None:
    """Prune one layer alone, so that its inputs are the dense model's, and compare the choice.

    The layers tried are the last linear one and one from the middle. Raises Wrong for another
    choice than the plain computation's.
    """
    modules = dict(family.make().named_modules())
    linear = [name for name in layers if type(modules.get(name)) is nn.Linear]
    for name in {linear[-1], linear[len(linear) // 2]} if linear else ():
        model, data = family.make(), family.data()
        norms = column_norms(model, name, data)
        if norms is None:
            continue  # never called as a module
        layer: Any = model.get_submodule(name)
        scores = layer.weight.detach().double().abs() * norms
        others = [other for other in layers if other != name]
        found = gs.prune(model, gs.weights.Wanda(), density=0.5, data=data, exclude=others)
        if set(found.supports) != {name}:
            raise Wrong(f"{sorted(found.supports)} pruned where only {name} was left")
        ranked(name, scores, found.supports[name].mask)


def column_norms(model: nn.Module, name: str, data: list[Any]) -> Tensor | None:
    """The norm of every input feature of one layer over all batches, less padding."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        seen.append(real_rows(given.detach(), mask))

    handle = model.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        for batch in data:
            named = isinstance(batch, Mapping)
            mask = batch.get("attention_mask") if named else None
            model(**batch) if named else model(batch)
    handle.remove()
    return torch.cat(seen).double().norm(dim=0) if seen else None


def real_rows(given: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs as rows, without those of padded positions."""
    if mask is not None and given.dim() >= 3 and given.shape[:2] == mask.shape:
        given = given[mask.bool()]
    elif mask is not None and given.dim() == 3 and given.shape[:2] == mask.t().shape:
        given = given[mask.bool().t()]
    elif mask is not None and given.dim() == 2 and given.shape[0] == mask.numel():
        given = given[mask.bool().flatten()]
    return given.reshape(-1, given.shape[-1])


def ranked(name: str, scores: Tensor, kept: Tensor) -> None:
    """Raise Wrong where a row keeps a weight and drops one with a larger score."""
    smallest = scores.masked_fill(~kept, torch.inf).amin(1)
    largest = scores.masked_fill(kept, 0.0).amax(1)
    rows = int((largest > smallest * (1 + CLOSE)).sum())
    if rows:
        raise Wrong(f"{name}: {rows} of {len(scores)} rows keep other weights than Wanda's")
