"""Packed layers made of the tensors of a file, which must agree with their manifest entry."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gossamer.core.activations import InputState
from gossamer.core.errors import FormatError, UsageError
from gossamer.io.manifest import Active, PackedLayer, _one_line
from gossamer.nn import ActiveLinear, BitmapLinear, NMLinear, QuantizedLinear
from gossamer.nn.active import Rotation
from gossamer.ops.active import Neurons
from gossamer.ops.quantized import QuantizedMatrix

Packed = ActiveLinear | BitmapLinear | NMLinear | QuantizedLinear


def packed_layer(name: str, facts: PackedLayer, tensors: dict[str, Tensor]) -> Packed:
    """Takes the layer's tensors out of `tensors`; raises FormatError on any contradiction."""
    if facts.active is not None:
        return _active_layer(name, facts, facts.active, tensors)
    if facts.group is not None:
        return _quantized_layer(name, facts, tensors)
    index = "codes" if facts.nm else "bitmap"
    try:
        values, places = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.{index}")
        bias = tensors.pop(f"{name}.bias") if facts.bias else None
    except KeyError as error:
        raise FormatError(f"layer {name}: tensor {error} is missing") from None
    out, width = facts.shape
    fits = values.dim() == (2 if facts.nm else 1) and str(values.dtype)[6:] == facts.dtype
    # not every dtype that a file may claim can be counted
    if not fits or facts.nnz != (int(values.count_nonzero()) if facts.nm else values.numel()):
        raise FormatError(f"layer {name}: its values are not {facts.nnz} of {facts.dtype}")
    _check_bias(name, bias, out)
    try:
        kind = NMLinear if facts.nm else BitmapLinear
        return kind(values, places, width, out, bias, facts.pattern, facts.requested_density)
    except (FormatError, UsageError) as error:
        raise FormatError(f"layer {name}: {_one_line(error)}") from None


def _check_bias(name: str, bias: Tensor | None, out: int) -> None:
    if bias is not None and (bias.shape != (out,) or not bias.is_floating_point()):
        raise FormatError(f"layer {name}: its bias does not have {out} numbers")


def _active_layer(
    name: str, facts: PackedLayer, told: Active, tensors: dict[str, Tensor]
) -> ActiveLinear:
    """Its rotation is that of the layer that leads, which `share_rotations` finds."""
    out, width = facts.shape
    shapes: dict[str, tuple[int, ...]] = {"values": (width, out)}
    if facts.dtype == "int8":
        shapes["scales"] = (1, out) if told.across else (width, 1)
    if told.norms:
        shapes["norms"] = (width,)
    if told.rank:
        shapes["down"], shapes["up"] = (told.rank, width), (out, told.rank)
    if told.turns == name:
        shapes["turns"] = (width, width)
    if facts.bias:
        shapes["bias"] = (out,)
    parts = {}
    for part, shape in shapes.items():
        found = tensors.pop(f"{name}.{part}", None)
        kind = facts.dtype if part == "values" else None
        if found is None:
            raise FormatError(f"layer {name}: tensor '{name}.{part}' is missing")
        right = str(found.dtype)[6:] == kind if kind else found.is_floating_point()
        if tuple(found.shape) != shape or not right:
            raise FormatError(f"layer {name}: {part} is {tuple(found.shape)} of {found.dtype}")
        parts[part] = found.contiguous()
    bypass = (parts["down"], parts["up"]) if told.rank else None
    state = InputState(told.kept, parts.get("norms"), bypass, told.facts)
    rotation = Rotation(parts["turns"]) if "turns" in parts else None
    try:
        columns = Neurons(parts["values"], parts.get("scales"))
    except UsageError as error:
        raise FormatError(f"layer {name}: {_one_line(error)}") from None
    layer = ActiveLinear(
        columns, state, told.budget, parts.get("bias"), by=told.by, rotation=rotation,
        leads=told.turns or "", own_name=name,
    )  # fmt: skip
    return layer


def share_rotations(layers: Mapping[str, Packed]) -> None:
    """Give layers with a common input the rotation of the one that leads; raises FormatError."""
    for name, layer in layers.items():
        if not isinstance(layer, ActiveLinear) or not layer.leads or layer.rotation is not None:
            continue
        lead = layers.get(layer.leads)
        shared = lead.rotation if isinstance(lead, ActiveLinear) else None
        if shared is None or shared.matrix.shape[0] != layer.in_features:
            raise FormatError(f"layer {name}: no layer {layer.leads} holds its rotation")
        layer.rotation = shared


def _quantized_layer(name: str, facts: PackedLayer, tensors: dict[str, Tensor]) -> QuantizedLinear:
    def take(part: str, present: bool = True) -> Tensor | None:
        return tensors.pop(f"{name}.{part}") if present else None

    try:
        values, scales = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.scales")
        bitmap, zeros = take("bitmap", facts.sparse), take("zeros", facts.zeros)
        bias = take("bias", facts.bias)
        outliers = None
        if facts.outliers:
            parts = [tensors.pop(f"{name}.outlier_{part}") for part in ("ptr", "cols", "values")]
            outliers = (parts[0], parts[1], parts[2])
    except KeyError as error:
        raise FormatError(f"layer {name}: tensor {error} is missing") from None
    _check_bias(name, bias, facts.shape[0])
    try:
        bits, group = int(facts.dtype.removeprefix("int")), facts.group or 0
        matrix = QuantizedMatrix.of(
            values, bitmap, scales, zeros, outliers, facts.shape, bits, group
        )
    except (FormatError, UsageError) as error:
        raise FormatError(f"layer {name}: {_one_line(error)}") from None
    layer = QuantizedLinear(matrix, bias, facts.pattern, facts.requested_density)
    found = 0 if outliers is None else outliers[1].numel()
    if layer.kept != facts.nnz or found != facts.outliers:
        raise FormatError(f"layer {name}: it keeps {layer.kept} weights, not {facts.nnz}")
    return layer
