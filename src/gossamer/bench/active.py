"""Suite `active`: one row of input of which only some entries count, weights from memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.bench import baselines
from gossamer.bench.measure import Limits, Repeats, interleaved
from gossamer.core.errors import GossamerError
from gossamer.ops import active

_COLD = 200 << 20
"""Weights of so many bytes take turns, so that none stays in a cache."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Case:
    """A layer (out, inputs), or a gated MLP of `inputs` neurons and width `out`; zeros: fraction."""

    name: str
    out: int
    inputs: int
    dtype: str
    zeros: float


def cases() -> list[Case]:
    """Columns at 50, 65 and 80% sparsity in three dtypes, and MLPs of two models' geometries."""
    columns = [
        Case(f"columns 4096x11008 {dtype} zeros {zeros:g}", 4096, 11008, dtype, zeros)
        for dtype in _DTYPES
        for zeros in (0.5, 0.65, 0.8)
    ]
    mlps = [
        Case(f"{kind} {out}x{neurons} {dtype} zeros {zeros:g}", out, neurons, dtype, zeros)
        for kind, zeros in (("mlp by product", 0.8), ("mlp by gate", 0.8))
        for out, neurons in ((2048, 5632), (4096, 11008))
        for dtype in ("bfloat16", "int8")
    ]
    return columns + mlps


def measure(case: Case, limits: Limits, rounds: Repeats | int = 7) -> dict[str, Any]:
    """Times of ours and of dense engines; raises GossamerError where a result is wrong."""
    build = _columns if case.name.startswith("columns") else _mlp
    calls, expected, nbytes = build(case)
    for name, call in calls.items():
        found = call()
        error = float((found.double() - expected).norm() / expected.norm())
        allowed = 2e-2 if found.dtype == torch.bfloat16 else 1e-3
        if "dense" not in name and not error < allowed:
            raise GossamerError(f"{name} is wrong on {case}: relative error {error:.1e}")
    with torch.inference_mode():
        turns = interleaved(calls, rounds)
    return turns.record(case, limits.seconds(nbytes, 0))


Build = tuple[dict[str, Callable[[], Tensor]], Tensor, int]


def _columns(case: Case) -> Build:
    """Ours, the dense engines, the exact result and the bytes of the columns that count."""
    weight, x = _random(case.out, case.inputs), _random(case.inputs, seed=1)
    neurons = active.store(weight.t(), _DTYPES[case.dtype])
    copies = _copies((1 - case.zeros) * neurons.nbytes)
    turn = itertools.cycle([neurons, *(_copy(neurons) for _ in range(copies - 1))])
    limit = float(x.abs().quantile(case.zeros))
    kept = torch.where(x.abs() > limit, x, 0.0)
    count = int((kept != 0).sum())
    width = neurons.values.element_size()
    dense, rows = [weight] * 2, x.reshape(1, -1)
    found: dict[str, Callable[[], Tensor] | None] = {
        "gossamer": lambda: active.linear(x, next(turn), threshold=limit),
        "torch dense float32": baselines.torch_dense(dense, rows, torch.float32),
        "torch dense bfloat16": baselines.torch_dense([weight] * 3, rows, torch.bfloat16),
        "numpy dense float32": baselines.numpy_dense([weight, weight.clone()], rows),
        "onnxruntime dense float32": baselines.onnx_dense(dense, rows),
    }
    calls = {name: call for name, call in found.items() if call is not None}
    expected = kept.double() @ neurons.to_float().double()
    return calls, expected, count * case.out * width


def _mlp(case: Case) -> Build:
    """As `_columns`; bytes of gate, of the rows of up and of the columns of down that count."""
    dtype, k = _DTYPES[case.dtype], round((1 - case.zeros) * case.inputs)
    weights = [_random(case.inputs, case.out, seed=seed) / case.out**0.5 for seed in range(3)]
    parts = [active.store(weight, dtype) for weight in weights]
    copies = _copies(sum(part.nbytes for part in parts))
    turn = itertools.cycle([parts, *([_copy(p) for p in parts] for _ in range(copies - 1))])
    x, by = _random(case.out, seed=9), case.name.split()[2]
    dense = [w.bfloat16() for w in weights[:2]] + [weights[2].t().contiguous().bfloat16()]
    dense_copies = _copies(sum(w.nbytes for w in dense))
    dense_turn = itertools.cycle([[w.clone() for w in dense] for _ in range(dense_copies)])
    gate, up, down = (part.to_float().double() for part in parts)
    score = functional.silu(gate @ x.double())
    hidden = score * (up @ x.double())
    chosen = (score if by == "gate" else hidden).abs().topk(k).indices
    expected = hidden[chosen] @ down[chosen]
    reads = case.inputs + k + (k if by == "gate" else case.inputs)
    calls = {
        "gossamer": lambda: active.gated_mlp(x, *next(turn), k=k, by=by),
        "torch dense bfloat16": lambda: _dense_mlp(x.bfloat16(), next(dense_turn)),
        "torch dense float32": lambda: _dense_mlp(x, [*weights[:2], weights[2].t()]),
    }
    return calls, expected, reads * case.out * parts[0].values.element_size()


def _dense_mlp(x: Tensor, weights: list[Tensor]) -> Tensor:
    gate, up, down = weights
    rows = x.reshape(1, -1)
    hidden = functional.silu(functional.linear(rows, gate)) * functional.linear(rows, up)
    return functional.linear(hidden, down)


def _copy(neurons: active.Neurons) -> active.Neurons:
    return active.Neurons(neurons.values.clone(), neurons.scale)


def _copies(nbytes: float) -> int:
    return max(2, math.ceil(_COLD / nbytes))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
