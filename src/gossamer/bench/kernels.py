"""Suite `kernels`: one sparse linear layer, at shapes, densities and batches that models have."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.bench import baselines, integer_baselines
from gossamer.bench.measure import Limits, Repeats, interleaved
from gossamer.core.errors import GossamerError
from gossamer.nn import BitmapLinear, QuantizedLinear
from gossamer.nn.kernel_choice.decide import choose_columns, choose_form
from gossamer.ops._dispatch import isa
from gossamer.ops.bitmap.native import MATVEC_ROWS
from gossamer.ops.quantized.reference import quantize_input

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4}
_COLD = 200 << 20
"""Weights of so many bytes take turns where a single one could stay in a cache."""
_ROUNDED = {"int8": 0.03, "int4": 0.25}
"""Relative errors that rounding weights and inputs to so many bits may make."""


@dataclass(frozen=True)
class Case:
    """One measurement: the layer (out, in), dtype of its values, density and batch size.

    block: what is kept or dropped whole, such as 16x1, or the even pattern, such as 2:4. Integers
    have a scale per 128 columns; their baselines get the weights in bfloat16, integer engines round
    them in their own ways. form: "sparse" for integers held by their bitmap in memory; else
    as layers are by rule.
    """

    out: int
    inputs: int
    dtype: str
    density: float
    batch: int
    block: str = ""
    form: str = ""


def cases() -> list[Case]:
    """Decoding of MLP-sized layers, and batches of 16 and 128, of blocks too."""
    decode = [
        Case(out, inputs, dtype, density, 1)
        for out, inputs in ((4096, 11008), (4096, 4096))
        for dtype in DTYPES
        for density in (0.5, 0.3, 0.2, 0.1, 0.05)
    ]
    batches = [
        Case(4096, 4096, dtype, density, batch)
        for dtype in DTYPES
        for batch in (16, 128)
        for density in (0.5, 0.3, 0.2, 0.1, 0.05)
    ]
    blocks = [
        Case(4096, 4096, "float32", density, 128, block)
        for block in ("16x1", "8x1", "4x1", "1x16", "16x16")
        for density in (0.3, 0.1)
    ]
    integers = [
        Case(out, inputs, dtype, density, 1)
        for out, inputs in ((4096, 11008), (4096, 4096))
        for dtype in BITS
        for density in (0.5, 0.2, 1.0)
    ]
    integers += [Case(4096, 11008, "int4", density, 1, form="sparse") for density in (0.5, 0.2)]
    integers += [
        Case(4096, 11008, dtype, 0.5, 1, even) for dtype in BITS for even in ("2:4", "4:8")
    ]
    return decode + integers + batches + blocks


def measure(case: Case, limits: Limits, rounds: Repeats | int = 7) -> dict[str, Any]:
    """Times of ours and every baseline present; raises GossamerError where a result is wrong."""
    matrix = _matrix(case)
    width = matrix.element_size()
    copies = max(1, min(8, -(-_COLD // (matrix.numel() * width)))) if case.batch <= 8 else 1
    x = torch.randn(case.batch, case.inputs, generator=torch.Generator().manual_seed(1))
    x = x.to(matrix.dtype).float()
    first = _layer(case, matrix)
    layers = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
    for layer in layers:
        if case.batch > 8 and isinstance(layer, BitmapLinear):
            layer.prepare_large_batches()
    calls = _calls([matrix] * copies, layers, x, case.block)
    _check(case, calls, matrix, x, first)
    with torch.inference_mode():
        turns = interleaved(calls, rounds)
    nnz, nbytes = _size(first)
    ours = turns.seconds["gossamer"]
    ratios = {name: taken / ours for name, taken in turns.seconds.items() if name != "gossamer"}
    return {
        **turns.record(case, limits.seconds(nbytes, 2 * nnz * case.batch)),
        "ratios": ratios,
        "ratio_to_sparse_peers": {
            name: ratio for name, ratio in ratios.items() if "csr" in name or "bsr" in name
        },
    }


Layer = BitmapLinear | QuantizedLinear


def _layer(case: Case, matrix: Tensor) -> Layer:
    if case.dtype in BITS:
        layer = QuantizedLinear.from_matrix(matrix, bits=BITS[case.dtype])
        if not case.form:
            choose_form(layer, None, large_batches=False)
        return layer
    packed = BitmapLinear.from_matrix(matrix, pattern=f"block:{case.block}" if case.block else "")
    if case.batch <= MATVEC_ROWS:
        choose_columns(packed, None)
    return packed


def _size(layer: Layer) -> tuple[int, int]:
    """Kept weights, and the bytes that a product reads."""
    if isinstance(layer, QuantizedLinear):
        return layer.kept, layer.matrix.nbytes
    index = layer.bitmap if layer.columns is None else layer.columns
    return layer.values.numel(), layer.values.nbytes + index.nbytes


def _matrix(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(case.out, case.inputs, generator=generator)
    if ":" in case.block:
        keep, group = map(int, case.block.split(":"))
        parts = matrix.reshape(-1, group)
        parts.scatter_(1, torch.rand(parts.shape, generator=generator).argsort(1)[:, keep:], 0.0)
        return parts.reshape(matrix.shape).to(torch.bfloat16)
    high, wide = map(int, case.block.split("x")) if case.block else (1, 1)
    drop = torch.rand(case.out // high, case.inputs // wide, generator=generator) > case.density
    drop = drop.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return matrix.masked_fill_(drop, 0.0).to(DTYPES.get(case.dtype, torch.bfloat16))


def _calls(
    weights: list[Tensor], layers: Sequence[Layer], x: Tensor, block: str = ""
) -> dict[str, Callable[[], Tensor]]:
    turn, inputs = itertools.cycle(layers), x.to(weights[0].dtype)

    def ours() -> Tensor:
        return next(turn)(inputs)

    found: dict[str, Callable[[], Tensor] | None] = {
        "gossamer": ours,
        "torch dense float32": baselines.torch_dense(weights, x, torch.float32),
        "torch dense bfloat16": baselines.torch_dense(weights, x, torch.bfloat16),
        "numpy dense float32": baselines.numpy_dense(weights, x),
        "onnxruntime dense float32": baselines.onnx_dense(weights[:2], x),
        "gossamer dense bfloat16": baselines.own_dense_bfloat16(weights, x),
        "torch csr float32": baselines.torch_csr(weights[:2], x),
        "scipy csr float32": baselines.scipy_csr(weights[:2], x),
    }
    if len(inputs) > MATVEC_ROWS and isa() == "avx512":
        found["gossamer avx2"] = lambda: _with_isa("avx2", ours)
    if "x" in block:
        found["torch bsr float32"] = baselines.torch_bsr(weights[:1], x, block)
    if isinstance(layers[0], QuantizedLinear):
        found |= {
            "torch dense int8 fbgemm": integer_baselines.torch_int8(weights, x, "fbgemm"),
            "torch dense int8 onednn": integer_baselines.torch_int8(weights, x, "onednn"),
            "torch dense int4": integer_baselines.torch_int4(weights, x),
            "onnxruntime dense int8": integer_baselines.onnx_int8(weights, x),
            "onnxruntime dense int4": integer_baselines.onnx_int4(weights, x),
        }
    return {name: call for name, call in found.items() if call is not None}


def _with_isa(name: str, call: Callable[[], Tensor]) -> Tensor:
    """The result of kernels for other processors than this one, which are chosen by environment."""
    before = os.environ.get("GOSSAMER_ISA")
    os.environ["GOSSAMER_ISA"] = name
    try:
        return call()
    finally:
        os.environ.pop("GOSSAMER_ISA")
        if before is not None:
            os.environ["GOSSAMER_ISA"] = before


def _check(
    case: Case, calls: dict[str, Callable[[], Tensor]], matrix: Tensor, x: Tensor, layer: Layer
) -> None:
    """No speed for a wrong result: ours within float32 rounding, bfloat16 outputs within theirs.

    Of our integers the product of what they stand for is expected, with inputs rounded as they are;
    of other engines' the product of the weights themselves, within what their bits allow.
    """
    exact = x.double() @ matrix.double().t()
    for name, call in calls.items():
        expected = exact
        if isinstance(layer, QuantizedLinear) and name == "gossamer":
            expected = quantize_input(x).double() @ layer.to_matrix().double().t()
        with torch.inference_mode():
            found = call()
        error = float((found.double() - expected).norm() / expected.norm())
        allowed = 1e-2 if found.dtype == torch.bfloat16 else 1e-4
        allowed = next((e for bits, e in _ROUNDED.items() if bits in name), allowed)
        if not error < allowed:
            raise GossamerError(f"{name} is wrong on {case}: relative error {error:.1e}")
