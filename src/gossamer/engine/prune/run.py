"""Pruning a model in place, block by block, with any scorer or solver."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.matrix import Weight
from gossamer.core.pattern import Pattern, format_pattern
from gossamer.core.result import LayerRecord, PruneResult, unwrap
from gossamer.core.stats import LayerStats
from gossamer.core.support import Support
from gossamer.engine import hooks
from gossamer.engine.checks import needs_of
from gossamer.engine.coverage import coverage_of, nonzeros, warn
from gossamer.engine.data import Batch, digest_batches, digest_model
from gossamer.engine.progress import Step, track
from gossamer.engine.protocols import Allocation, Method, Reports, Solver
from gossamer.engine.prune.journal import Figures, Journal
from gossamer.engine.prune.plan import LOST, Plan, Uncalled, Unit, options_of, plan_of
from gossamer.models import find_weights
from gossamer.ops.select import select, select_global

HESSIANS = 4 << 30
"""Bytes of Hessians that are gathered at once."""


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
    uncalled: Uncalled = "dense",
    keep_zeros: bool = False,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> PruneResult:
    """Prune `model` in place; what `gossamer.prune` does once strings are resolved.

    See there for the arguments and what is raised.
    """
    model = unwrap(model)
    options = options_of(
        method, pattern, density, allocation,
        include=include, exclude=exclude, uncalled=uncalled, keep_zeros=keep_zeros,
    )  # fmt: skip
    with hooks.evaluating(model):
        with track(None, progress, "reading the data") as tick:
            plan = plan_of(model, options, data, tick)
        book = _open(journal, plan)
        supports, figures, resumed = _run(plan, book, progress)
        _check_written(plan, supports)
    result = _result(plan, supports, figures, resumed)
    warn(result.coverage)
    return result


def _open(folder: str | os.PathLike[str] | None, plan: Plan) -> Journal | None:
    if folder is None:
        return None
    options = plan.options
    return Journal(
        folder,
        {
            "method": repr(options.method),
            "pattern": format_pattern(options.pattern),
            "density": options.density,
            "allocation": repr(options.allocation),
            "keep_zeros": options.keep_zeros,
            "layers": plan.densities,
            "units": [unit.label for unit in plan.units],
            "model": digest_model(plan.model),
            "data": digest_batches(plan.batches or []),
            "torch": torch.__version__,
        },
    )


def _run(
    plan: Plan, journal: Journal | None, progress: bool
) -> tuple[dict[str, Support], Figures, int]:
    """Prune or restore unit after unit; returns supports, what the method reports of its work, and
    how many units were restored."""
    supports: dict[str, Support] = {}
    figures: Figures = {}
    resumed = 0
    chosen = _select_together(plan) if plan.together else {}
    with track(len(plan.units), progress) as step:
        for index, unit in enumerate(plan.units):
            if plan.calibrator is not None:
                plan.calibrator.tick = _inside(step, unit.label)
            # Units are done in order, so a gap cannot be trusted: only a prefix is restored.
            if journal and resumed == index and journal.has(index):
                done, told = journal.restore(
                    index, unit.weights, plan.options.pattern, plan.densities
                )
                resumed += 1
            else:
                done, told = _prune_unit(plan, unit, chosen)
                if journal:
                    journal.write(index, unit.weights, done, told)
            if plan.calibrator is not None and unit.block is None:
                plan.calibrator.changed_outside()
            supports.update(done)
            figures.update(told)
            step(unit.label)
    kept = {name: supports[name] for name in plan.weights if name in supports}
    return kept, {name: figures[name] for name in kept if name in figures}, resumed


def _inside(step: Step, label: str) -> Callable[[str], None]:
    return lambda text: step(f"{label}: {text}", 0)


def _select_together(plan: Plan) -> dict[str, Support]:
    scores = {}
    for name, weight in plan.weights.items():
        matrix = weight.matrix()
        score = plan.options.method.score(matrix, LayerStats(name, 0))
        scores[name] = _zeros_last(score, matrix) if plan.options.keep_zeros else score
    return select_global(scores, plan.options.pattern, plan.options.density)


def _prune_unit(
    plan: Plan, unit: Unit, chosen: Mapping[str, Support]
) -> tuple[dict[str, Support], Figures]:
    """Prune one unit; all of its weights are solved before the first of them is written.

    One that its statistics no longer reach has no support and stays as it is.
    """
    matrices: dict[str, Tensor] = {}
    supports: dict[str, Support] = {}
    figures: Figures = {}
    for weights in _in_turns(plan, unit):
        stats: dict[str, LayerStats] = {}
        if plan.calibrator is not None:
            stats = plan.calibrator.gather(weights, unit.block, needs_of(plan.options.method))
        for name, weight in weights.items():
            own = stats.pop(name, None)
            if own is None and plan.calibrator is not None:
                continue
            told: Mapping[str, float] = {}
            if name in chosen:
                matrix, support = weight.matrix(), chosen[name]
            else:
                stat = own or LayerStats(name, 0)
                matrix, support, told = _solve(plan, name, weight.matrix(), stat)
            if told:
                figures[name] = told
            matrices[name], supports[name] = _keeping_zeros(plan, weight, matrix, support)
    for name, support in supports.items():
        try:
            unit.weights[name].write(support.apply(matrices.pop(name)))
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    return supports, figures


def _in_turns(plan: Plan, unit: Unit) -> list[dict[str, Weight]]:
    """The unit's weights, such that the Hessians of each part stay within `HESSIANS`: a block may
    have hundreds of experts."""
    parts: list[dict[str, Weight]] = [{}]
    held = 0
    for name, weight in unit.weights.items():
        size = 8 * weight.matrix().shape[1] ** 2  # a sum in float32 and what rounding took from it
        if parts[-1] and held + size > HESSIANS and "hessian" in needs_of(plan.options.method):
            parts.append({})
            held = 0
        parts[-1][name] = weight
        held += size
    return parts


def _solve(
    plan: Plan, name: str, weight: Tensor, stats: LayerStats
) -> tuple[Tensor, Support, Mapping[str, float]]:
    method: Any = plan.options.method
    pattern, density = plan.options.pattern, plan.densities[name]
    if not isinstance(method, Solver):
        score = method.score(weight, stats)
        if plan.options.keep_zeros:
            score = _zeros_last(score, weight)
        return weight, select(score, pattern, density, name), {}
    told: Mapping[str, float] = {}
    if isinstance(method, Reports):
        repaired, support, told = method.solve_and_report(weight, stats, pattern, density)
    else:
        repaired, support = method.solve(weight, stats, pattern, density)
    repaired = repaired.to(weight.dtype)
    if not bool(torch.isfinite(repaired).all()):
        raise NonFiniteError(
            f"{name}: {plan.options.method.card.name} gave NaN or inf; raise its damping or give more data"
        )
    return repaired, support, told


def _zeros_last(score: Tensor, weight: Tensor) -> Tensor:
    """The scores with those of weights that are zero below all others."""
    if not score.numel():
        return score
    score = score.float() if score.dtype.itemsize < 4 else score
    low = score.min() - score.abs().max() - 1
    return torch.where(weight == 0, low, score)


def _keeping_zeros(
    plan: Plan, weight: Weight, matrix: Tensor, support: Support
) -> tuple[Tensor, Support]:
    """The same without what was zero before, where that is wanted."""
    if not plan.options.keep_zeros:
        return matrix, support
    mask = support.mask & (weight.matrix() != 0)
    return matrix, Support(mask, support.pattern, support.requested_density)


def _check_written(plan: Plan, supports: Mapping[str, Support]) -> None:
    """Raise UsageError where a weight is not zero outside its support: something wrote over it."""
    for name, support in supports.items():
        if bool((plan.weights[name].matrix() != 0).logical_and_(~support.mask).any()):
            raise UsageError(
                f"{name}: is not zero where it was pruned; its weight shares memory with another, "
                "so leave one of them out"
            )


def _result(
    plan: Plan, supports: dict[str, Support], figures: Figures, resumed: int
) -> PruneResult:
    options, calibrator = plan.options, plan.calibrator
    pattern = format_pattern(options.pattern)
    records, kept, total = [], 0, 0
    for name, support in supports.items():
        tensor = plan.weights[name].tensor
        size, nonzero = tensor.numel() * tensor.element_size(), nonzeros(tensor)
        records.append(
            LayerRecord(
                name=name,
                shape=tuple(tensor.shape),
                density=nonzero / tensor.numel() if tensor.numel() else 1.0,
                requested_density=plan.densities[name],
                pattern=format_pattern(support.pattern),
                dense_bytes=size,
                sparse_bytes=size,
            )
        )
        kept, total = kept + nonzero, total + tensor.numel()
    left = plan.left | {name: LOST for name in plan.weights if name not in supports}
    provenance = {
        "method": repr(options.method),
        "pattern": pattern,
        "allocation": repr(options.allocation),
        "calibration_batches": len(plan.batches or []),
        "chained": calibrator.chained if calibrator else None,
        "resumed_units": resumed,
        "torch": torch.__version__,
    }
    return PruneResult(
        model=plan.model,
        supports=supports,
        layers=tuple(records),
        method=options.method.card.name,
        pattern=pattern,
        requested_density=options.density,
        measured_density=kept / total if total else 1.0,
        provenance=provenance,
        coverage=coverage_of(plan.model, find_weights(plan.model), supports, left),
        notes=plan.notes
        + _padding_note(calibrator.unmasked if calibrator else ())
        + _counts(options.method.card.name, figures),
        figures=figures,
    )


def _counts(method: str, figures: Figures) -> tuple[str, ...]:
    """What the method counted, over all layers."""
    counts: dict[str, list[int]] = {}
    for told in figures.values():
        for what, value in told.items():
            if isinstance(value, int) and value:
                counts.setdefault(what, []).append(value)
    return tuple(
        f"{method}: {sum(values):,} {what} in {len(values)} of {len(figures)} layers"
        for what, values in counts.items()
    )


def _padding_note(names: Iterable[str]) -> tuple[str, ...]:
    names = sorted(names)
    if not names:
        return ()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"padding was counted where the mask did not fit the inputs: {', '.join(names[:3])}{more}",
    )
