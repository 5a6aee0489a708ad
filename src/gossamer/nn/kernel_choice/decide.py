"""Choosing what serves a layer by measured latencies: the dense product or one of the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import PatternError
from gossamer.core.matrix import as_matrix
from gossamer.core.pattern import Block, parse_pattern
from gossamer.core.result import LayerRecord
from gossamer.nn.kernel_choice.latency import Predictor, ProductShape
from gossamer.nn.packed.bitmap import BitmapLinear
from gossamer.nn.packed.conv import PackedConv2d
from gossamer.nn.packed.nm import NMLinear
from gossamer.nn.packed.quantized import QuantizedLinear
from gossamer.ops import _dispatch
from gossamer.ops.bitmap import WIDEST
from gossamer.ops.blocks import HEIGHTS
from gossamer.ops.conv import sharing, suits_tiles
from gossamer.ops.quantized.native import has_byte_products

BATCH = 128
"""Rows of input for which layers of a model that sees batches are chosen."""
COLUMNS_UP_TO = {"avx512": 0.12, "avx2": 0.3}
"""Densities up to which reading columns beats expanding bitmaps, by instructions."""
SLOWER = "no kernel wins"
"""How the reason begins of a layer that is dense because that is faster where it was decided."""
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Models whose decoding is compiled into one loop, where a product of one row costs no call."""
PIXELS = 196
"""Pixels for which a convolution is chosen: 14 x 14, the middle of a usual network."""


@dataclass(frozen=True)
class Decision:
    """The fastest, `dense` or a kernel, and the seconds predicted of each for `rows` of input."""

    chosen: str
    predicted: dict[str, float]
    rows: int
    unit: str = "row"
    word: str = "predicted"
    note: str = ""

    def __str__(self) -> str:
        """`predicted bitmap-matvec 0.22 ms, dense 0.41 ms for 1 row`: the fastest first."""
        order = sorted(self.predicted.items(), key=lambda item: item[1])
        times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in order)
        unit = self.unit + ("s" if self.rows > 1 else "")
        return f"{self.word} {times} for {self.rows} {unit}{self.note}"


def decide(
    module: nn.Module,
    record: LayerRecord,
    latency: Predictor,
    large_batches: bool,
    calls: bool = True,
) -> Decision | None:
    """The fastest for one linear layer or convolution; None where it was not measured.

    Models that generate text are judged by one row, others by `BATCH` rows, convolutions by
    `PIXELS`. calls: whether one row costs a call, which the compiled loop does not make.
    """
    if isinstance(module, nn.Conv2d):
        family = convolution_family(module.kernel_size, module.stride)
        return _by_convolution(as_matrix(module), family, module.weight.dtype, record, latency)
    return _by_linear(module.weight.dtype, record, latency, large_batches, calls)


def _by_linear(
    dtype: Any, record: LayerRecord, latency: Predictor, large_batches: bool, calls: bool
) -> Decision | None:
    rows = BATCH if large_batches else 1
    if large_batches:
        names = ["dense", "sell-spmm", "bitmap-unpack", "bitmap-spmm"]
    else:
        names = ["dense", "bitmap-matvec"] + ["csr-matvec"] * (record.shape[1] <= WIDEST)
    out, inputs = record.shape[0], record.shape[1]
    high = block_height(record.pattern, out, inputs)
    if large_batches and high:
        names = ["dense", "block-spmm", "bitmap-unpack", "bitmap-spmm"]
    shape = ProductShape(out, inputs, record.density)
    predicted = _predict(latency, names, dtype, rows, shape, high, calls or rows > 1)
    return _fastest(latency, predicted, rows, "row")


def why_dense(
    layer: BitmapLinear | NMLinear | PackedConv2d,
    latency: Predictor | None,
    large_batches: bool,
    calls: bool = True,
) -> str | None:
    """Why the dense product is the faster one for a packed layer here; None where it is not.

    What a file stores does not depend on it. Arguments as in `decide`; latency None: nothing is
    known and the layer stays as it is.
    """
    if latency is None:
        return None
    shape = (layer.out_features, layer.in_features)
    record = LayerRecord("", shape, layer.density, layer.density, pattern=layer.pattern)
    if isinstance(layer, PackedConv2d):
        window, matrix = layer.window, layer.to_matrix()
        family = convolution_family(window.kernel, window.stride)
        decision = _by_convolution(matrix, family, layer.values.dtype, record, latency)
    else:
        decision = _by_linear(layer.values.dtype, record, latency, large_batches, calls)
    wins = decision is None or decision.chosen != "dense"
    return None if wins else f"{SLOWER}: {decision}"


def _by_convolution(
    matrix: Tensor, family: str, dtype: Any, record: LayerRecord, latency: Predictor
) -> Decision | None:
    """By the form that its zeros would get, and its family of kernel and stride."""
    kernel = "tiled-conv" if suits_tiles(matrix) else "sparse-conv"
    shape = ProductShape(record.shape[0], record.shape[1], record.density)
    if kernel == "tiled-conv":
        shape = replace(shape, high=sharing(matrix))
    predicted = {}
    for name in ("dense-conv", kernel):
        named = str(dtype).removeprefix("torch.")
        seconds = latency.seconds(name + family, named, PIXELS, shape)
        if seconds is not None:
            predicted[name.replace("dense-conv", "dense")] = seconds
    return _fastest(latency, predicted, PIXELS, "pixel")


def convolution_family(kernel: tuple[int, ...], stride: tuple[int, ...]) -> str:
    """What the latencies of a convolution are called behind its kernel: 1x1 ones, and all others.

    Others were measured at 3x3 with stride 1 and 2; larger kernels differ in their inputs alone.
    A 1x1 one with a horizontal stride above 2 picks its pixels first and is a plain one then.
    """
    if tuple(kernel) == (1, 1):
        return "" if max(stride) == 1 or stride[1] > 2 else "-1x1s2"
    return "-3x3" if max(stride) == 1 else "-3x3s2"


def _fastest(
    latency: Predictor, predicted: dict[str, float], rows: int, unit: str
) -> Decision | None:
    if "dense" not in predicted or len(predicted) < 2:
        return None
    chosen = min(predicted, key=lambda name: predicted[name])
    return Decision(chosen, predicted, rows, unit, latency.word, latency.note)


def _wins(
    name: str, latency: Predictor | None, predicted: dict[str, float], rows: int, rule: bool
) -> tuple[bool, str]:
    """Whether a kernel is the fastest, and why; `rule` where that is not known."""
    if latency is None or name not in predicted or len(predicted) < 2:
        return rule, "by rule"
    chosen = min(predicted, key=lambda each: predicted[each])
    decision = Decision(chosen, predicted, rows, "row", latency.word, latency.note)
    return chosen == name, f"by measured latencies: {decision}"


def _predict_layer(
    latency: Predictor | None,
    names: list[str],
    layer: BitmapLinear | NMLinear | QuantizedLinear,
    dtype: Any,
    rows: int,
    high: int = 0,
) -> dict[str, float]:
    """`_predict` for what a layer keeps, which is counted only where latencies are known."""
    if latency is None:
        return {}
    shape = ProductShape(layer.out_features, layer.in_features, layer.density)
    return _predict(latency, names, dtype, rows, shape, high)


def _predict(
    latency: Predictor,
    names: list[str],
    dtype: Any,
    rows: int,
    shape: ProductShape,
    high: int,
    calls: bool = True,
) -> dict[str, float]:
    """Seconds of every named kernel that was measured; blocks have `high` rows."""
    predicted = {}
    for name in names:
        amount = replace(shape, high=high) if name == "block-spmm" else shape
        seconds = latency.seconds(name, str(dtype).removeprefix("torch."), rows, amount, calls)
        if seconds is not None:
            predicted[name] = seconds
    return predicted


def prepare_where_it_pays(model: nn.Module, latency: Predictor | None) -> None:
    """`prepare` for every packed linear layer of a model."""
    for module in model.modules():
        if isinstance(module, BitmapLinear | NMLinear):
            prepare(module, latency)


def prepare(layer: BitmapLinear | NMLinear, latency: Predictor | None) -> bool:
    """Build a packed layer's form for batches where that is predicted to be the fastest.

    Judged by `BATCH` rows against what serves the layer without the form; latency None, or a model
    that lack these kernels: always. The layer's `large_batches_decided` says what was done and why.
    """
    high = block_height(layer.pattern, layer.out_features, layer.in_features)
    form = "block-spmm" if high and isinstance(layer, BitmapLinear) else "sell-spmm"
    names = [form, "bitmap-unpack"] + ["bitmap-spmm"] * isinstance(layer, BitmapLinear)
    predicted = _predict_layer(latency, names, layer, layer.values.dtype, BATCH, high)
    wins, why = _wins(form, latency, predicted, BATCH, rule=True)
    if wins:
        layer.prepare_large_batches()
    layer.large_batches_decided = f"{'prepared' if wins else 'not prepared'} {why}"
    return wins


def choose_forms(model: nn.Module, latency: Predictor | None, large_batches: bool) -> None:
    """`choose_form` for every quantised layer of a model, `choose_columns` for those with bitmaps."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            choose_form(module, latency, large_batches)
        elif isinstance(module, BitmapLinear):
            choose_columns(module, latency)


def choose_columns(layer: BitmapLinear, latency: Predictor | None) -> None:
    """Hold the columns of kept weights where that is predicted to be faster for one row of input.

    It costs 2 more bytes for each. Without latencies by rule: up to a density that depends on the
    instructions. The layer's `rows_decided` says what was done and why.
    """
    if layer.in_features > WIDEST:
        return
    names = ["bitmap-matvec", "csr-matvec"]
    predicted = _predict_layer(latency, names, layer, layer.values.dtype, 1)
    rule = layer.density <= COLUMNS_UP_TO.get(_dispatch.isa(), 0.0)
    holds, why = _wins("csr-matvec", latency, predicted, 1, rule)
    if holds:
        layer.prepare_columns()
    layer.rows_decided = f"{'columns' if holds else 'bitmap'} read {why}"


def choose_form(layer: QuantizedLinear, latency: Predictor | None, large_batches: bool) -> None:
    """Fill a sparse quantised layer where dense integers are predicted to be faster.

    Judged by one row of input, or by `BATCH` rows. Without latencies by rule: 4 bits, and where
    bytes cannot be multiplied into 32-bit sums 8 bits too, take longer to put in their places than
    dense ones to read, except where every 4 or 8 columns keep half. Portable kernels multiply what
    is kept alone. The layer's `form_decided` says what was done and why.
    """
    if layer.bitmap is None or layer.matrix.balanced:
        return
    rows, names = (BATCH if large_batches else 1), ["bitmap-matvec", "dense"]
    predicted = _predict_layer(latency, names, layer, f"int{layer.bits}", rows)
    vectors = _dispatch.isa() in ("avx2", "avx512")
    rule = vectors and (layer.bits == 4 or not has_byte_products())
    fills, why = _wins("dense", latency, predicted, rows, rule)
    if fills:
        layer.densify()
    layer.form_decided = f"{'dense' if fills else 'sparse'} integers in memory {why}"


def block_height(pattern: str, out: int, inputs: int) -> int:
    """Rows of a block where the pattern is one of whole blocks that a kernel serves, else 0."""
    try:
        parsed = parse_pattern(pattern)
    except PatternError:
        return 0
    if not isinstance(parsed, Block) or out % parsed.rows or inputs % parsed.cols:
        return 0
    return parsed.rows if parsed.rows in HEIGHTS else 0
