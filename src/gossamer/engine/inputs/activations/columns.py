"""Layers that choose their inputs, packed: each weight once, as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.result import LayerRecord
from gossamer.engine.inputs.activations.break_even import stay_dense
from gossamer.engine.inputs.activations.layer_plan import LayerPlan, turned
from gossamer.nn.active import Rotation
from gossamer.nn.packed.active import ActiveLinear, columns_of
from gossamer.nn.packed.places import put, why_not_here
from gossamer.ops.active import kernel_name


def pack_layers(
    root: nn.Module,
    plans: Mapping[str, LayerPlan],
    names: Sequence[str],
    by: str,
    bits: int | None,
    timed: bool,
) -> list[LayerRecord]:
    """A record of each layer that was packed; the others are left to `compress`."""
    if bits not in (None, 8):
        raise UsageError(f"layers that choose inputs are stored with 8 bits or none, not {bits}")
    plans = {name: plans[name] for name in names}
    # integers read half as much as the dense layer at any density, so they are not timed
    limit = None if timed and bits is None else float("inf")
    whys = stay_dense(plans, {name: _linear(root, name) for name in names}, limit)
    rotations: dict[int, tuple[str, Rotation]] = {}
    records = []
    for name in names:
        each, layer = plans[name], _linear(root, name)
        if each.state.density >= 1 or name in whys or why_not_here(root, name, layer) is not None:
            continue
        lead, rotation = name, None
        if each.rotation is not None:
            key = id(each.rotation)
            lead, rotation = rotations.setdefault(key, (name, Rotation(each.rotation)))
        columns = columns_of(turned(layer.weight.detach(), each.rotation), bits)
        packed = ActiveLinear(
            columns, each.state, each.budget, layer.bias, by=by, rotation=rotation, leads=lead,
            own_name=name, dtype=layer.weight.dtype,
        )  # fmt: skip
        records.append(_record(layer, packed, each))
        put(root, layer, packed)
    return records


def _linear(root: nn.Module, name: str) -> nn.Linear:
    layer = root.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _record(layer: nn.Linear, packed: ActiveLinear, each: LayerPlan) -> LayerRecord:
    return LayerRecord(
        each.name, each.shape, 1.0, 1.0, kernel_name(), dense_bytes=layer.weight.nbytes,
        sparse_bytes=packed.nbytes, batch_kernel="dense columns",
        decided=f"asked for: a token keeps {each.state.density:.3f} of the inputs",
    )  # fmt: skip
