"""Suite `nm`: a layer that keeps N of every M weights, one row of input or a batch."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.bench import baselines
from gossamer.bench.measure import Limits, Repeats, interleaved
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, parse_pattern
from gossamer.core.select import select
from gossamer.nn import BitmapLinear, NMLinear
from gossamer.ops.statistics import top_mask

_COLD = 200 << 20
"""Weights of so many bytes take turns, so that none stays in a cache."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A layer (out, inputs) with values of dtype, and batch size."""

    name: str
    out: int
    inputs: int
    pattern: str
    dtype: str
    batch: int


def cases() -> list[Case]:
    """Decoding of an MLP-sized layer in bfloat16, and a batch of 128 in float32."""
    return [
        Case(f"{pattern} {out}x{inputs} {dtype} batch {batch}", out, inputs, pattern, dtype, batch)
        for out, inputs, dtype, batch in (
            (4096, 11008, "bfloat16", 1),
            (4096, 4096, "float32", 16),
            (4096, 4096, "float32", 128),
        )
        for pattern in ("2:4", "1:4", "1:16")
    ]


def measure(case: Case, limits: Limits, rounds: Repeats | int = 7) -> dict[str, Any]:
    """Times of ours, of the bitmap form and of dense engines; GossamerError for a wrong result."""
    matrix = _matrix(case)
    layer = NMLinear.from_matrix(matrix, None, case.pattern)
    other = BitmapLinear.from_matrix(matrix)
    if case.batch > 8:
        layer.prepare_large_batches()
        other.prepare_large_batches()
    x = torch.randn(case.batch, case.inputs, generator=torch.Generator().manual_seed(1))
    inputs, weights = x.to(matrix.dtype), [matrix] * (2 if case.batch <= 8 else 1)
    found: dict[str, Callable[[], Tensor] | None] = {
        "gossamer": _turns(layer, inputs, layer.nbytes, case),
        "gossamer bitmap": _turns(other, inputs, layer.nbytes, case),
        "torch dense float32": baselines.torch_dense(weights, x, torch.float32),
        "torch dense bfloat16": baselines.torch_dense(weights, x, torch.bfloat16),
        "numpy dense float32": baselines.numpy_dense(weights, x),
        "onnxruntime dense float32": baselines.onnx_dense(weights, x),
    }
    calls = {name: call for name, call in found.items() if call is not None}
    _check(case, calls, inputs.double() @ matrix.double().t())
    with torch.inference_mode():
        turns = interleaved(calls, rounds)
    ours, flops = turns.seconds["gossamer"], 2 * layer.kept * case.batch
    return {
        **turns.record(case, limits.seconds(layer.nbytes, flops)),
        "ratio_to_bitmap": turns.seconds["gossamer bitmap"] / ours,
        "bytes": layer.nbytes,
        "bytes_of_bitmap": other.values.nbytes + other.bitmap.nbytes,
        "gigabytes_per_second": layer.nbytes / ours / 1e9,
        "gigaflops": flops / ours / 1e9,
        "kernel": layer.batch_kernel or "nm-matvec",
    }


def _turns(layer: nn.Module, x: Tensor, nbytes: int, case: Case) -> Callable[[], Tensor]:
    """Copies of the layer take turns in decoding, where a single one could stay in a cache."""
    copies = min(32, max(2, math.ceil(_COLD / nbytes))) if case.batch <= 8 else 1
    turn = itertools.cycle([layer, *(copy.deepcopy(layer) for _ in range(copies - 1))])
    return lambda: next(turn)(x)


def _matrix(case: Case) -> Tensor:
    matrix = torch.randn(case.out, case.inputs, generator=torch.Generator().manual_seed(0))
    pattern = parse_pattern(case.pattern)
    assert isinstance(pattern, NM)
    mask = select(matrix.abs(), pattern, pattern.density, top=top_mask).mask
    return (matrix * mask).to(_DTYPES[case.dtype])


def _check(case: Case, calls: dict[str, Callable[[], Tensor]], expected: Tensor) -> None:
    """No speed for a wrong result; bfloat16 outputs within their rounding."""
    for name, call in calls.items():
        with torch.inference_mode():
            found = call()
        error = float((found.double() - expected).norm() / expected.norm())
        allowed = 1e-2 if found.dtype == torch.bfloat16 else 1e-4
        if "dense" not in name and not error < allowed:
            raise GossamerError(f"{name} is wrong on {case}: relative error {error:.1e}")
