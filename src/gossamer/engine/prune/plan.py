"""Everything that `prune` decides and checks before the first weight changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gossamer.core.allocation import LayerInfo, Uniform
from gossamer.core.density import check_density
from gossamer.core.errors import NonFiniteError, PatternError, UsageError
from gossamer.core.matrix import Weight, own_forward
from gossamer.core.pattern import NM, Pattern, check_pattern, format_pattern, pattern_kind
from gossamer.core.stats import LayerStats
from gossamer.engine.checks import check_method, needs_of, patterns_of
from gossamer.engine.data import Batch, read_batches
from gossamer.engine.protocols import Allocation, Method, Solver
from gossamer.engine.prune.around import gather_angles
from gossamer.engine.prune.calibrate import STATISTICS, Calibrator
from gossamer.engine.prune.padding import hides_padding
from gossamer.models import Choice, choose_weights, find_blocks, find_weights
from gossamer.models.layers import EXPECTED, nothing_to_prune
from gossamer.nn.serving import Packed

Uncalled = Literal["dense", "error"]


@dataclass(frozen=True)
class Options:
    """The arguments of `prune` that say what is wanted."""

    method: Any
    pattern: Pattern
    density: float
    allocation: Allocation
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    uncalled: Uncalled = "dense"
    keep_zeros: bool = False


@dataclass(frozen=True)
class Unit:
    """Weights pruned together: those of one block, or one outside the blocks."""

    label: str
    weights: dict[str, Weight]
    block: int | None


@dataclass(frozen=True)
class Plan:
    """What will be pruned, in which order, to which density; `left` says why others will not."""

    model: nn.Module
    options: Options
    weights: dict[str, Weight]
    units: list[Unit]
    densities: dict[str, float]
    batches: list[Batch] | None
    calibrator: Calibrator | None
    together: bool
    left: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def options_of(
    method: Method,
    pattern: Pattern | None,
    density: float | None,
    allocation: Allocation | None,
    **others: Any,
) -> Options:
    """The checked options; raises UsageError for those that contradict each other."""
    check_method(method, STATISTICS)
    allocation = Uniform() if allocation is None else allocation
    if isinstance(allocation, type) or not callable(getattr(allocation, "allocate", None)):
        raise UsageError(f"allocation is one such as Uniform() or ERK(), not {allocation!r}")
    if unknown := set(allocation.needs) - {"norm", "angle"}:
        raise UsageError(
            f"allocation {type(allocation).__name__} needs {', '.join(sorted(unknown))}, which "
            "calibration does not gather"
        )
    pattern = method.default_pattern if pattern is None else pattern
    if not isinstance(pattern, Pattern):
        raise UsageError(f"pattern is one such as NM(2, 4) or Unstructured(), not {pattern!r}")
    if others.get("uncalled", "dense") not in ("dense", "error"):
        raise UsageError(f"uncalled is 'dense' or 'error', not {others['uncalled']!r}")
    density = _density(pattern, density, allocation)
    if pattern_kind(pattern) not in patterns_of(method):
        raise PatternError(
            f"{method.card.name} does not admit {format_pattern(pattern)}; it admits "
            f"{', '.join(patterns_of(method))}"
        )
    return Options(method, pattern, density, allocation, **others)


def plan_of(
    model: nn.Module,
    options: Options,
    data: Iterable[Batch] | None,
    tick: Callable[[str], None],
) -> Plan:
    """Decide and check everything; `tick` is called as the data passes through the model."""
    method, allocation = options.method, options.allocation
    check_model(model)
    choice = choose_weights(model, options.include, options.exclude)
    check_holds(model, choice)
    check_weights(choice, options)
    weights, left = _without_misfits(choice, options)
    if not weights:
        raise UsageError(nothing_to_prune(model, left))
    together = _ranked_together(options)
    needs = needs_of(method)
    needs_data = bool(needs) or bool(allocation.needs)
    if needs_data and data is None:
        who = method if needs else allocation
        raise UsageError(f"{type(who).__name__} needs calibration data: pass data=batches")
    batches = None if data is None or not needs_data else read_batches(data)
    calibrator = None
    if batches is not None:
        calibrator = Calibrator(model, find_blocks(model), weights, batches, tick)
        weights, unreached = _reached(weights, calibrator, options)
        left |= unreached
    densities = _densities(weights, choice.blocks, options, calibrator)
    order = calibrator.order if calibrator else None
    units = _units(weights, choice.blocks, find_blocks(model), order)
    return Plan(
        model, options, weights, units, densities, batches,
        calibrator if needs else None, together, left, _notes(model, weights, batches or []),
    )  # fmt: skip


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


def check_holds(model: nn.Module, choice: Choice) -> None:
    """Raise UsageError, naming the layer, for a weight that cannot be read and written."""
    for name, weight in find_weights(model).items():
        if choice.left.get(name) not in EXPECTED.values():
            reason = _why_unreadable(getattr(weight.module, weight.parameter))
            if reason is not None:
                raise UsageError(f"{name}: {reason}")


def check_model(model: nn.Module) -> None:
    """Raise UsageError for a model whose layers were quantised or compressed."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise UsageError(f"{path}: is quantised; prune the model before it is quantised")
    packed = any(isinstance(module, Packed) for module in model.modules())
    if packed and not any(w.reads_input for w in find_weights(model).values()):
        raise UsageError(
            f"{type(model).__name__}: all its layers are compressed already; prune the dense model"
        )


def _why_unreadable(weight: Tensor) -> str | None:
    if nn.parameter.is_lazy(weight):
        return "is not initialised yet; run the model on one batch first"
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}; prune the model before that wraps it"
    if weight.device.type == "meta":
        return "is on the meta device, without values; load its weights first"
    if any(n > 1 and not step for n, step in zip(weight.shape, weight.stride(), strict=True)):
        return "its weight is expanded, so its entries share memory; make it contiguous first"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return (
            f"its weight is {weight.dtype}; Gossamer prunes float64, float32, float16 and bfloat16:"
            " convert the model first"
        )
    return None


def check_weights(choice: Choice, options: Options) -> None:
    """Raise, naming the layer, for weights that the method cannot prune."""
    method, pattern = options.method, options.pattern
    needs = needs_of(method)
    for name, weight in choice.weights.items():
        if isinstance(weight.module, nn.Embedding) and needs:
            raise UsageError(
                f"{name}: an embedding looks rows up and multiplies nothing, so {method.card.name} "
                "has no statistics of its inputs; prune it in a call of its own by Magnitude or "
                "Random"
            )
        if needs and (reason := _own_forward(weight)):
            raise UsageError(
                f"{name}: {reason}, and so is what its weight multiplies; prune it by Magnitude or "
                "Random, or leave it out"
            )
        matrix = weight.matrix()
        if weight.plain or name in choice.named:
            check_pattern(pattern, matrix.shape, name)
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError(f"{name}: its weight holds NaN or inf; repair the model first")


def _own_forward(weight: Weight) -> str | None:
    return None if isinstance(weight.part, int) else own_forward(weight.module)


def _without_misfits(choice: Choice, options: Options) -> tuple[dict[str, Weight], dict[str, str]]:
    """The weights that pattern and method suit, and why others stay dense: of kinds that no kernel
    serves, nobody has to exclude them by hand."""
    weights, left = dict(choice.weights), dict(choice.left)
    needs = bool(needs_of(options.method)) or bool(options.allocation.needs)
    for name, weight in choice.weights.items():
        reason = None
        if needs and isinstance(weight.module, _ConvNd) and weight.module.groups > 1:
            reason = "each group of a convolution has inputs of its own; Magnitude prunes it"
        if needs and isinstance(weight.module, nn.Bilinear):
            reason = "a bilinear layer multiplies two inputs; Magnitude prunes it"
        if reason is not None and name in choice.named:
            raise UsageError(f"{name}: {reason}")
        if reason is None and not weight.plain and name not in choice.named:
            reason = _misfit(options.pattern, weight)
        if reason is not None:
            left[name] = reason
            del weights[name]
    return weights, left


def _misfit(pattern: Pattern, weight: Weight) -> str | None:
    try:
        check_pattern(pattern, weight.matrix().shape, "")
    except PatternError:
        return f"{format_pattern(pattern)} does not fit its shape {tuple(weight.matrix().shape)}"
    return None


def _reached(
    weights: Mapping[str, Weight], calibrator: Calibrator, options: Options
) -> tuple[dict[str, Weight], dict[str, str]]:
    """The weights whose inputs the data shows, as they lie; and why the others stay dense."""
    kept, left = {}, {}
    for name, weight in weights.items():
        ways = calibrator.flipped.get(name, {weight.flipped})
        if name not in calibrator.order:
            left[name] = UNREACHED if weight.reads_input else UNSEEN
        elif ways == {weight.flipped}:
            kept[name] = weight
        elif isinstance(weight.part, int) and len(ways) == 1:
            kept[name] = replace(weight, transposed=not weight.flipped)
        else:
            left[name] = "it multiplies inputs along another axis than its layer does"
    if not kept or (left and options.uncalled == "error"):
        names = list(left)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UsageError(
            f"the calibration data never reached {', '.join(names[:3])}{more}; give data that "
            "does, exclude them, or prune them by Magnitude"
        )
    return kept, left


UNREACHED = "the calibration data never reached it"
UNSEEN = "its product was not seen in calibration"
LOST = "the calibration data no longer reached it after earlier layers were pruned"


def _ranked_together(options: Options) -> bool:
    method, pattern = options.method, options.pattern
    if getattr(pattern, "scope", "tensor") != "global":
        return False
    if isinstance(method, Solver) or needs_of(method):
        raise PatternError(
            f"{method.card.name} works on one layer at a time, so it cannot rank weights of all "
            "layers together; for a density per layer that follows the whole model pass "
            "allocation=Global() with scope 'tensor'"
        )
    if not isinstance(options.allocation, Uniform):
        raise UsageError(
            f"{format_pattern(pattern)} already decides every layer's density, so allocation "
            f"{type(options.allocation).__name__} cannot apply; leave one of them out"
        )
    return True


def _densities(
    weights: Mapping[str, Weight],
    blocks: Mapping[str, int | None],
    options: Options,
    calibrator: Calibrator | None,
) -> dict[str, float]:
    norms: dict[str, LayerStats] = {}
    angles: dict[int, float] = {}
    if "norm" in options.allocation.needs and calibrator is not None:
        norms = calibrator.gather(weights, None, ("norm",))
    if "angle" in options.allocation.needs and calibrator is not None:
        found = gather_angles(calibrator, find_blocks(calibrator.model))
        angles = {index: block.angle for index, block in enumerate(found) if block.count}
    infos = [
        LayerInfo(
            name=name,
            shape=tuple(weight.tensor.shape),
            block=blocks[name],
            weight=weight.matrix(),
            norm=norms[name].norm if name in norms else None,
            angle=None if (block := blocks[name]) is None else angles.get(block),
        )
        for name, weight in weights.items()
    ]
    densities = options.allocation.allocate(infos, options.density)
    return {name: float(densities[name]) for name in weights}


def _units(
    weights: Mapping[str, Weight],
    placed: Mapping[str, int | None],
    blocks: Sequence[tuple[str, nn.Module]],
    order: Mapping[str, int] | None,
) -> list[Unit]:
    """Blocks in order, and parameters outside them as units of their own, where the model calls
    them; the matrices that one parameter stacks are a unit too.

    Without a call order (methods that need no data) the order of modules serves: it changes
    nothing in the result.
    """
    grouped: dict[str, Unit] = {}
    for name, weight in weights.items():
        block = placed[name]
        own = name if weight.part is None else name.rpartition(".")[0]
        label = own if block is None else blocks[block][0]
        unit = grouped.setdefault(label, Unit(label, {}, block))
        unit.weights[name] = weight
    units = list(grouped.values())
    if order is None:
        return units
    last = len(order)
    first_call = [min(order.get(name, last) for name in unit.weights) for unit in units]
    in_blocks = [(unit.block, at) for unit, at in zip(units, first_call, strict=True)]
    blocks_begin = min((at for block, at in in_blocks if block is not None), default=0)

    def place(index: int) -> tuple[int, int]:
        block, at = in_blocks[index]
        if block is not None:
            return 1, block
        return (0 if at < blocks_begin else 2), at

    return [units[index] for index in sorted(range(len(units)), key=place)]


def _notes(
    model: nn.Module, weights: Mapping[str, Weight], batches: Sequence[Batch]
) -> tuple[str, ...]:
    notes = []
    if any(map(hides_padding, batches)):
        notes.append("padding was counted where attention_mask is not (batch, tokens)")
    packed = sum(isinstance(module, Packed) for module in model.modules())
    if packed:
        notes.append(f"{packed} layers are compressed already and stay as they are")
    for name, weight in weights.items():
        reason = _own_forward(weight)
        if reason is not None:
            notes.append(f"{name}: the stored weight was pruned, but {reason}")
    return tuple(notes)
