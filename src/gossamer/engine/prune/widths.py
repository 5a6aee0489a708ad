"""Cutting neurons and heads out of a transformer, so that an ordinary smaller one remains."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.density import check_density
from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.matrix import is_transposed, own_forward
from gossamer.core.result import LayerRecord, PruneResult
from gossamer.core.width import Width
from gossamer.engine.coverage import coverage_of
from gossamer.engine.protocols import Planner
from gossamer.engine.prune.channels import obstacle
from gossamer.engine.prune.plan import check_model
from gossamer.models.layers import default_reasons
from gossamer.models.weights import find_weights
from gossamer.models.widths import CoupledWidth, Slot, config_fields, find_widths

_OTHER = "it holds no neurons or heads that were cut"


def prune_widths(model: nn.Module, planner: Planner, density: float) -> PruneResult:
    """Cut units out of `model` in place; each layer keeps the same number, so that its config can
    say it. What `gossamer.prune` does with a planner.

    Everything is checked first, also that a model made from the smaller config has exactly the
    shapes and numbers that remain.

    Raises UsageError for a model whose widths are not known or whose config cannot say what would
    remain, and for layers that cannot be cut; NonFiniteError for NaN weights.
    """
    density = check_density(density)
    check_model(model)
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UsageError(
            f"{type(model).__name__} has no config of transformers to say how wide it is; "
            "gs.remove_channels cuts other networks"
        )
    widths, fields = _found(model, planner, config, density)
    for width in widths:
        _check(model, width)
    changed = _differences(model, config, fields, _sides(model, widths, density))
    chosen = [_chosen(model, planner, x, density) for x in widths]
    before = {s.layer: _weight(model, s).numel() for x in widths for s in x.slots}
    for width, keep in zip(widths, chosen, strict=True):
        for slot in width.slots:
            _cut(model.get_submodule(slot.layer), slot.writes, slot.index[keep])
    _tell(model, config, fields, changed)
    units = {x.kind: x.units for x in widths}
    kept = [f"{_count(n, density)} of {n} {kind} stay in each layer" for kind, n in units.items()]
    return _result(model, planner, density, before, fields, kept)


def _found(
    model: nn.Module, planner: Planner, config: Any, density: float
) -> tuple[list[CoupledWidth], dict[str, int]]:
    """The widths to cut, and what the config will say."""
    widths: list[CoupledWidth] = []
    fields: dict[str, int] = {}
    for kind in planner.kinds:
        found = find_widths(model, kind)
        if not found:
            raise UsageError(
                f"{type(model).__name__}: where it keeps {kind} is not known; cut others by "
                f"{type(planner).__name__}(kinds=...), or prune it by a scorer"
            )
        sizes = sorted({x.units for x in found})
        if len(sizes) > 1:
            raise UsageError(
                f"{type(model).__name__}: its layers have {sizes} {kind}, and one number in its "
                "config must say what remains"
            )
        widths += found
        fields |= config_fields(config, kind, _count(sizes[0], density))
    return widths, fields


def _count(units: int, density: float) -> int:
    return max(1, round(density * units))


def _check(model: nn.Module, width: CoupledWidth) -> None:
    """Raise UsageError, naming the layer, where one of them cannot be cut."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(path)
    for slot in width.slots:
        module = model.get_submodule(slot.layer)
        reason = own_forward(module) or obstacle(module)
        if reason:
            raise UsageError(f"{slot.layer}: cannot be cut: {reason}")
        weight = module._parameters["weight"]
        others = [x for x in owners[id(weight)] if x != slot.layer]
        if others:
            raise UsageError(f"{slot.layer}: cannot be cut: its weight is tied to {others[0]}")
        if weight is None or not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"{slot.layer}: its weight holds NaN or inf; repair it first")


def _sides(
    model: nn.Module, widths: Sequence[CoupledWidth], density: float
) -> dict[str, tuple[bool, int]]:
    """By layer which side is cut, and how wide it will be."""
    return {
        slot.layer: (slot.writes, slot.index.shape[1] * _count(width.units, density))
        for width in widths
        for slot in width.slots
    }


def _differences(
    model: nn.Module, config: Any, fields: Mapping[str, int], sides: Mapping[str, tuple[bool, int]]
) -> dict[str, dict[str, int]]:
    """The numbers, by module, that a model of the smaller config has otherwise.

    Raises UsageError where that model would not be what cutting leaves.
    """
    smaller = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(smaller, name, value)
    old, new = _outline(model, config), _outline(model, smaller)
    before = old.state_dict()
    for name, tensor in new.state_dict().items():
        have, layer = before.get(name), name.rpartition(".")[0]
        if have is None or (have.shape != tensor.shape and layer not in sides):
            raise _cannot_say(model, fields, f"{name} would change too")
    for name, (writes, width) in sides.items():
        if _side(new.get_submodule(name), writes) != width:
            raise _cannot_say(model, fields, f"{name} would not be {width} wide")
    return _numbers(model, old, new, fields)


def _numbers(
    model: nn.Module, old: nn.Module, new: nn.Module, fields: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    changed: dict[str, dict[str, int]] = {}
    before = dict(old.named_modules())
    for path, module in new.named_modules():
        for key, value in vars(module).items():
            was = vars(before[path]).get(key)
            if type(value) is int and value != was:
                changed.setdefault(path, {})[key] = value
            elif type(value) is float and value != was:
                raise _cannot_say(model, fields, f"{path}.{key} would become {value:g}")
    return changed


def _outline(model: nn.Module, config: Any) -> nn.Module:
    """A model of this config without values."""
    try:
        with torch.device("meta"):
            return type(model)(config)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} cannot be made from the config of what would remain: {error}"
        ) from error


def _cannot_say(model: nn.Module, fields: Mapping[str, int], why: str) -> UsageError:
    said = ", ".join(f"{name}={value}" for name, value in fields.items())
    return UsageError(
        f"the config of {type(model).__name__} cannot say what would remain: with {said}, {why}; "
        "cut one kind alone, by kinds=('neurons',), or prune by a scorer"
    )


def _chosen(model: nn.Module, planner: Planner, width: CoupledWidth, density: float) -> Tensor:
    """bool (units,): the planner's choice, checked."""
    weights = {}
    for slot in width.slots:
        weight = _weight(model, slot)
        rows = weight if slot.writes else weight.t()
        weights[slot.layer] = rows[slot.index.to(rows.device)].flatten(1)
    count = _count(width.units, density)
    keep = planner.keep(Width(width.name, width.kind, width.units, weights), count).cpu()
    if keep.dtype != torch.bool or keep.shape != (width.units,) or int(keep.sum()) != count:
        raise UsageError(
            f"{width.name}: {planner.card.name} must keep {count} of {width.units} {width.kind}"
        )
    return keep


def _weight(model: nn.Module, slot: Slot) -> Tensor:
    """A layer's weight as (out, in)."""
    module = model.get_submodule(slot.layer)
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return weight.t() if is_transposed(module) else weight


def _side(module: nn.Module, writes: bool) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0 if writes != is_transposed(module) else 1])


@torch.no_grad()
def _cut(module: Any, writes: bool, index: Tensor) -> None:
    """Leave only these outputs, or inputs."""
    places = index.flatten().sort().values.to(module.weight.device)
    axis = 0 if writes != is_transposed(module) else 1
    for name in ("weight", "bias") if writes else ("weight",):
        old = module._parameters.get(name)
        if old is not None:
            kept = old.index_select(axis if old.dim() > 1 else 0, places)
            module._parameters[name] = nn.Parameter(kept, old.requires_grad)
    sides = ("out_features", "nf") if writes else ("in_features", "nx")
    for name in sides:
        if name in vars(module):
            setattr(module, name, len(places))


def _tell(
    model: nn.Module,
    config: Any,
    fields: Mapping[str, int],
    changed: Mapping[str, Mapping[str, int]],
) -> None:
    """Let config and modules know the new widths."""
    held = [vars(module).get("config") for module in model.modules()]
    for one in {id(x): x for x in (config, *held) if x is not None}.values():
        for name, value in fields.items():
            setattr(one, name, value)
    for path, numbers in changed.items():
        for key, value in numbers.items():
            setattr(model.get_submodule(path), key, value)


def _result(
    model: nn.Module,
    planner: Planner,
    density: float,
    before: Mapping[str, int],
    fields: Mapping[str, int],
    kept: Sequence[str],
) -> PruneResult:
    weights, records = find_weights(model), []
    for name, size in before.items():
        weight = weights[name].tensor
        held = weight.numel() * weight.element_size()
        records.append(
            LayerRecord(
                name,
                tuple(weight.shape),
                weight.numel() / size,
                density,
                pattern="coupled widths",
                dense_bytes=held,
                sparse_bytes=held,
            )
        )
    expected = default_reasons(model)
    left = {name: expected.get(name, _OTHER) for name in weights if name not in before}
    return PruneResult(
        model=model,
        supports={},
        layers=tuple(records),
        method=planner.card.name,
        pattern="coupled widths",
        requested_density=density,
        measured_density=sum(weights[n].tensor.numel() for n in before) / sum(before.values()),
        provenance={"method": repr(planner), "config": dict(fields), "torch": torch.__version__},
        coverage=coverage_of(model, weights, list(before), left),
        notes=(*kept, f"config now says {', '.join(f'{k}={v}' for k, v in fields.items())}"),
    )
