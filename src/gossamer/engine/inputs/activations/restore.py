"""A plan out of a file of thresholds: what a method derives from weights is derived again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gossamer.core.activations import InputState, InputStats
from gossamer.core.budget import Fraction, Threshold
from gossamer.core.errors import FormatError, UsageError
from gossamer.core.result import unwrap
from gossamer.engine.inputs.activations.calibrate import rotations_of
from gossamer.engine.inputs.activations.layer_plan import LayerPlan, turned
from gossamer.engine.inputs.activations.plan import ActivationPlan, Step
from gossamer.engine.inputs.activations.run import planned_layers


def restored(model: nn.Module, data: Mapping[str, Any], method: Any) -> ActivationPlan:
    """The plan that `data`, of `read_plan`, describes; raises UsageError for another model's."""
    model = unwrap(model)
    bare = {name: _bare(name, each) for name, each in data["layers"].items()}
    plan = ActivationPlan(method, bare, data["left"], model=data["model"])
    weights = {name: x.weight.detach() for name, x in planned_layers(model, plan).items()}
    groups: dict[int, list[str]] = defaultdict(list)
    for name, each in data["layers"].items():
        groups[each["group"]].append(name)
    rotations = rotations_of(method, list(groups.values()), weights)
    layers = {}
    for name, each in bare.items():
        layers[name] = _derived(each, data["layers"][name], method, weights[name], rotations)
    loss = None if data["loss"] is None else (data["loss"][0], data["loss"][1])
    path = tuple(Step(*step) for step in data["path"])
    return ActivationPlan(method, layers, data["left"], path, data["model"], loss)


def _bare(name: str, each: Mapping[str, Any]) -> LayerPlan:
    """A layer's numbers, without what the method derives."""
    try:
        shape = (int(each["shape"][0]), int(each["shape"][1]))
        budget = Threshold(each["threshold"]) if "threshold" in each else Fraction(each["fraction"])
        state = InputState(float(each["kept"]), facts=dict(each["facts"]))
        return LayerPlan(name, shape, float(each["density"]), budget, state, None, each["zeros"])
    except (UsageError, TypeError, ValueError, LookupError) as error:
        raise FormatError(f"layer {name} of the thresholds: {error}") from None


def _derived(
    each: LayerPlan,
    data: Mapping[str, Any],
    method: Any,
    weight: Tensor,
    rotations: Mapping[str, Tensor],
) -> LayerPlan:
    rotation = rotations.get(each.name)
    stats = InputStats(each.name, facts=dict(data["facts"]))
    state = method.prepare(turned(weight, rotation), stats, each.density)
    if abs(state.density - each.state.density) > 1e-9:
        raise FormatError(f"layer {each.name} of the thresholds: contradicts its method")
    return LayerPlan(
        each.name, each.shape, each.density, each.budget, state, rotation, each.zeros, data["group"]
    )
