"""Pruning a model in place, block by block, with any scorer or solver."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.allocation import LayerInfo, Uniform
from gossamer.core.errors import NonFiniteError, PatternError, UsageError
from gossamer.core.matrix import as_matrix, write_matrix
from gossamer.core.pattern import NM, Pattern, check_pattern, format_pattern, pattern_kind
from gossamer.core.result import LayerRecord, PruneResult, unwrap
from gossamer.core.select import check_density, select, select_global
from gossamer.core.stats import LayerStats
from gossamer.core.support import Support
from gossamer.engine import hooks
from gossamer.engine.calibrate import STATISTICS, Calibrator, gather_dense
from gossamer.engine.data import Batch, digest_batches, digest_model, read_batches
from gossamer.engine.journal import Journal, weight_of
from gossamer.engine.progress import track
from gossamer.engine.protocols import Allocation, Method, Solver, check_method
from gossamer.models import find_blocks, prunable_layers
from gossamer.ops.statistics import top_mask


@dataclass(frozen=True)
class _Unit:
    """Layers pruned together: those of one block, or one layer outside the blocks."""

    label: str
    layers: dict[str, nn.Module]
    block: int | None


@dataclass(frozen=True)
class _Plan:
    """Everything decided and checked before the first weight changes."""

    model: nn.Module
    method: Any
    pattern: Pattern
    density: float
    layers: dict[str, nn.Module]
    units: list[_Unit]
    densities: dict[str, float]
    batches: list[Batch] | None
    calibrator: Calibrator | None
    together: bool


def prune(
    model: nn.Module,
    method: Method,
    *,
    pattern: Pattern | None = None,
    density: float | None = None,
    allocation: Allocation | None = None,
    data: Iterable[Batch] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    journal: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> PruneResult:
    """Prune `model` in place and return it with its supports and figures.

    method: a scorer or a solver. pattern: by default the method's own. density: the fraction kept,
    in (0, 1]; may be left out for N:M. allocation: `Uniform()` by default. data: batches for a
    method or allocation that needs statistics: tensors, called as `model(batch)`, or dicts, called
    as `model(**batch)`; positions where a dict's `attention_mask` is 0 do not count.
    include, exclude: see `prunable_layers`. journal: a folder in which each finished block is kept,
    so that the same call on the same dense model resumes there and ends bitwise equal. progress: a
    bar on stderr.

    Blocks are pruned in order; each one's statistics come from its already pruned predecessors,
    and only one block's statistics are in memory. Training flags and hooks are left as they were.
    Bad arguments, patterns that do not fit and weights that hold NaN raise before anything
    changes. An error after that (NaN activations in a later block, a full disk) leaves the blocks
    before it pruned and the rest dense, which a journal turns into a resume.

    Raises UsageError, PatternError, NonFiniteError (each naming the layer) and FormatError for a
    damaged journal.
    """
    model = unwrap(model)
    with hooks.evaluating(model):
        plan = _plan(model, method, pattern, density, allocation, data, include, exclude)
        book = _open(journal, plan, allocation or Uniform())
        supports, resumed = _run(plan, book, progress)
    return _result(plan, supports, allocation or Uniform(), resumed)


def _plan(
    model: nn.Module,
    method: Method,
    pattern: Pattern | None,
    density: float | None,
    allocation: Allocation | None,
    data: Iterable[Batch] | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> _Plan:
    check_method(method, STATISTICS)
    allocation = allocation or Uniform()
    pattern = method.default_pattern if pattern is None else pattern
    density = _density(pattern, density, allocation)
    placed = prunable_layers(model, include, exclude)
    layers = {name: module for name, (module, _) in placed.items()}
    _check_layers(method, pattern, layers)
    together = _ranked_together(method, pattern, allocation)
    needs_data = bool(method.card.needs) or allocation.needs_norm
    if needs_data and data is None:
        who = method if method.card.needs else allocation
        raise UsageError(f"{type(who).__name__} needs calibration data: pass data=batches")
    batches = None if data is None or not needs_data else read_batches(data)
    calibrator = None
    if batches is not None and method.card.needs:
        calibrator = Calibrator(model, find_blocks(model), layers, batches)
    densities = _densities(model, placed, allocation, density, batches)
    order = calibrator.order if calibrator else None
    units = _units(placed, find_blocks(model), order)
    return _Plan(
        model, method, pattern, density, layers, units, densities, batches, calibrator, together
    )


def _density(pattern: Pattern, density: float | None, allocation: Allocation) -> float:
    if isinstance(pattern, NM):
        if not isinstance(allocation, Uniform):
            raise UsageError(
                f"{format_pattern(pattern)} fixes every layer's density, so allocation "
                f"{type(allocation).__name__} cannot apply; leave it out"
            )
        if density is not None and abs(check_density(density) - pattern.density) > 1e-9:
            raise UsageError(
                f"{format_pattern(pattern)} keeps {pattern.density:g} of the weights; leave "
                f"density out instead of asking for {density:g}"
            )
        return pattern.density
    if density is None:
        raise UsageError(f"{format_pattern(pattern)} needs a density, the fraction kept in (0, 1]")
    return check_density(density)


def _check_layers(method: Method, pattern: Pattern, layers: Mapping[str, nn.Module]) -> None:
    if pattern_kind(pattern) not in method.card.patterns:
        raise PatternError(
            f"{method.card.name} does not admit {format_pattern(pattern)}; it admits "
            f"{', '.join(method.card.patterns)}"
        )
    for name, module in layers.items():
        if isinstance(module, nn.Embedding) and method.card.needs:
            raise UsageError(
                f"{name}: an embedding looks rows up and multiplies nothing, so {method.card.name} "
                "has no statistics of its inputs; prune it in a call of its own by Magnitude or "
                "Random"
            )
        weight = as_matrix(module)
        check_pattern(pattern, weight.shape, name)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"{name}: its weight holds NaN or inf; repair the model first")


def _ranked_together(method: Method, pattern: Pattern, allocation: Allocation) -> bool:
    if getattr(pattern, "scope", "tensor") != "global":
        return False
    if isinstance(method, Solver) or method.card.needs:
        raise PatternError(
            f"{method.card.name} works on one layer at a time, so it cannot rank weights of all "
            "layers together; for a density per layer that follows the whole model pass "
            "allocation=Global() with scope 'tensor'"
        )
    if not isinstance(allocation, Uniform):
        raise UsageError(
            f"{format_pattern(pattern)} already decides every layer's density, so allocation "
            f"{type(allocation).__name__} cannot apply; leave one of them out"
        )
    return True


def _densities(
    model: nn.Module,
    placed: Mapping[str, tuple[nn.Module, int | None]],
    allocation: Allocation,
    density: float,
    batches: list[Batch] | None,
) -> dict[str, float]:
    norms: dict[str, LayerStats] = {}
    if allocation.needs_norm and batches is not None:
        modules = {name: module for name, (module, _) in placed.items()}
        norms = gather_dense(model, modules, batches, ("norm",))
    infos = [
        LayerInfo(
            name=name,
            shape=tuple(weight_of(module).shape),
            block=block,
            weight=as_matrix(module),
            norm=norms[name].norm if name in norms else None,
        )
        for name, (module, block) in placed.items()
    ]
    densities = allocation.allocate(infos, density)
    return {name: float(densities[name]) for name in placed}


def _units(
    placed: Mapping[str, tuple[nn.Module, int | None]],
    blocks: Sequence[tuple[str, nn.Module]],
    order: Mapping[str, int] | None,
) -> list[_Unit]:
    """Blocks in order, and layers outside them as units of their own, where the model calls them.

    Without a call order (methods that need no data) the order of modules serves: it changes
    nothing in the result.
    """
    grouped: dict[str, _Unit] = {}
    for name, (module, block) in placed.items():
        label = name if block is None else blocks[block][0]
        unit = grouped.setdefault(label, _Unit(label, {}, block))
        unit.layers[name] = module
    units = list(grouped.values())
    if order is None:
        return units
    last = len(order)
    first_call = [min(order.get(name, last) for name in unit.layers) for unit in units]
    in_blocks = [(unit.block, at) for unit, at in zip(units, first_call, strict=True)]
    blocks_begin = min((at for block, at in in_blocks if block is not None), default=0)

    def place(index: int) -> tuple[int, int]:
        block, at = in_blocks[index]
        if block is not None:
            return 1, block
        return (0 if at < blocks_begin else 2), at

    return [units[index] for index in sorted(range(len(units)), key=place)]


def _open(
    folder: str | os.PathLike[str] | None, plan: _Plan, allocation: Allocation
) -> Journal | None:
    if folder is None:
        return None
    return Journal(
        folder,
        {
            "method": repr(plan.method),
            "pattern": format_pattern(plan.pattern),
            "density": plan.density,
            "allocation": repr(allocation),
            "layers": plan.densities,
            "units": [unit.label for unit in plan.units],
            "model": digest_model(plan.model),
            "data": digest_batches(plan.batches or []),
            "torch": torch.__version__,
        },
    )


def _run(plan: _Plan, journal: Journal | None, progress: bool) -> tuple[dict[str, Support], int]:
    """Prune or restore unit after unit; returns the supports and how many were restored."""
    supports: dict[str, Support] = {}
    resumed = 0
    chosen = _select_together(plan) if plan.together else {}
    with track(len(plan.units), progress) as step:
        for index, unit in enumerate(plan.units):
            # Units are done in order, so a gap cannot be trusted: only a prefix is restored.
            if journal and resumed == index and journal.has(index):
                done = journal.restore(index, unit.layers, plan.pattern, plan.densities)
                resumed += 1
            else:
                done = _prune_unit(plan, unit, chosen)
                if journal:
                    journal.write(index, unit.layers, done)
            supports.update(done)
            step(unit.label)
    return {name: supports[name] for name in plan.layers}, resumed


def _select_together(plan: _Plan) -> dict[str, Support]:
    scores = {
        name: plan.method.score(as_matrix(module), LayerStats(name, 0, None, None))
        for name, module in plan.layers.items()
    }
    return select_global(scores, plan.pattern, plan.density, top_mask)


def _prune_unit(plan: _Plan, unit: _Unit, chosen: Mapping[str, Support]) -> dict[str, Support]:
    """Prune one unit; all of its layers are solved before the first of them is written."""
    stats: dict[str, LayerStats] = {}
    if plan.calibrator is not None:
        stats = plan.calibrator.gather(unit.layers, unit.block, plan.method.card.needs)
    weights: dict[str, Tensor] = {}
    supports: dict[str, Support] = {}
    for name, module in unit.layers.items():
        layer_stats = stats.pop(name, None) or LayerStats(name, 0, None, None)
        if name in chosen:
            weights[name], supports[name] = as_matrix(module), chosen[name]
        else:
            weights[name], supports[name] = _prune_layer(plan, name, module, layer_stats)
    for name, module in unit.layers.items():
        write_matrix(module, supports[name].apply(weights.pop(name)))
    return supports


def _prune_layer(
    plan: _Plan, name: str, module: nn.Module, stats: LayerStats
) -> tuple[Tensor, Support]:
    weight, density = as_matrix(module), plan.densities[name]
    method = plan.method
    if not isinstance(method, Solver):
        return weight, select(method.score(weight, stats), plan.pattern, density, name, top_mask)
    repaired, support = method.solve(weight, stats, plan.pattern, density)
    repaired = repaired.to(weight.dtype)
    if not bool(torch.isfinite(repaired).all()):
        raise NonFiniteError(
            f"{name}: {plan.method.card.name} gave NaN or inf; raise its damping or give more data"
        )
    return repaired, support


def _result(
    plan: _Plan, supports: dict[str, Support], allocation: Allocation, resumed: int
) -> PruneResult:
    pattern = format_pattern(plan.pattern)
    records, kept, total = [], 0, 0
    for name, module in plan.layers.items():
        support, weight = supports[name], weight_of(module)
        size = weight.numel() * weight.element_size()
        records.append(
            LayerRecord(
                name=name,
                shape=tuple(weight.shape),
                density=support.density,
                requested=plan.densities[name],
                pattern=pattern,
                dense_bytes=size,
                sparse_bytes=size,
            )
        )
        kept, total = kept + support.count, total + weight.numel()
    provenance = {
        "method": repr(plan.method),
        "pattern": pattern,
        "allocation": repr(allocation),
        "calibration_batches": len(plan.batches or []),
        "chained": plan.calibrator.chained if plan.calibrator else None,
        "resumed_units": resumed,
        "torch": torch.__version__,
    }
    return PruneResult(
        model=plan.model,
        supports=supports,
        layers=tuple(records),
        method=plan.method.card.name,
        pattern=pattern,
        requested_density=plan.density,
        measured_density=kept / total if total else 1.0,
        provenance=provenance,
    )
