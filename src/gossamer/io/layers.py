"""Packed layers made of the tensors of a file, which must agree with their manifest entry."""

from __future__ import annotations

from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.io.manifest import PackedLayer, _one_line
from gossamer.nn import BitmapLinear, NMLinear, QuantizedLinear
from gossamer.ops.quantized import QuantizedMatrix

Packed = BitmapLinear | NMLinear | QuantizedLinear


def packed_layer(name: str, facts: PackedLayer, tensors: dict[str, Tensor]) -> Packed:
    """Takes the layer's tensors out of `tensors`; raises FormatError on any contradiction."""
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
