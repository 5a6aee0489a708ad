"""Bitmap kernels against torch's dense linear (the faster of float32 and bfloat16), one process.

Decode rotates over enough copies of the weight that it comes from memory. Repeats are interleaved,
medians reported; no speed is recorded where the results disagree. Writes
benchmarks/results/kernels.json. Run: python benchmarks/cases/kernels.py
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional

from gossamer.nn import BitmapLinear
from gossamer.ops import _dispatch

OUT = Path(__file__).parents[1] / "results" / "kernels.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OUTPUTS, INPUTS, COPIES = 4096, 4096, 6


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def case(dtype: str, density: float, batch: int, repeats: int = 9) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(OUTPUTS, INPUTS, generator=generator)
    matrix[torch.rand(OUTPUTS, INPUTS, generator=generator) > density] = 0
    matrix = matrix.to(DTYPES[dtype])
    x = torch.randn(batch, INPUTS, generator=generator).to(DTYPES[dtype])
    copies = COPIES if batch == 1 else 1
    sparse = [BitmapLinear.from_matrix(matrix) for _ in range(copies)]
    dense = {
        name: [matrix.to(kind).clone() for _ in range(copies)] for name, kind in DTYPES.items()
    }
    expected = x.double() @ matrix.double().t()
    error = ((sparse[0](x).double() - expected).norm() / expected.norm()).item()
    assert error < 1e-2, f"{dtype} {density} {batch}: wrong by {error}"
    calls = {"sparse": lambda: [layer(x) for layer in sparse]}
    for name, weights in dense.items():
        inputs = x.to(DTYPES[name])
        calls[name] = lambda w=weights, v=inputs: [functional.linear(v, m) for m in w]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            taken = seconds(call) / copies
            if repeat:
                times[name].append(taken)
    median = {name: statistics.median(values) for name, values in times.items()}
    same, best = median[dtype], min(median["float32"], median["bfloat16"])
    return {
        "dtype": dtype,
        "density": density,
        "batch": batch,
        "milliseconds": {name: 1e3 * value for name, value in median.items()},
        "ratio_to_dense_of_same_dtype": same / median["sparse"],
        "ratio_to_best_dense": best / median["sparse"],
    }


def main() -> None:
    grid = [(t, d, 1) for t in DTYPES for d in (0.5, 0.2, 0.1)]
    grid += [(t, d, 128) for t in DTYPES for d in (0.5, 0.2, 0.1, 0.05)]
    with torch.inference_mode():
        cases = [case(*point) for point in grid]
    record = {
        "shape": [OUTPUTS, INPUTS],
        "kernels": _dispatch.describe(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "cases": cases,
    }
    OUT.write_text(json.dumps(record, indent=2) + "\n")
    for item in cases:
        print(
            item["dtype"],
            item["density"],
            item["batch"],
            f"{item['ratio_to_dense_of_same_dtype']:.2f}x same dtype,",
            f"{item['ratio_to_best_dense']:.2f}x best dense",
        )


if __name__ == "__main__":
    main()
