"""Bits per byte of the bundled model after each method, at 50% and 70% unstructured and at 2:4.

Three seeds (of the calibration windows, and of Random's positions) each; writes
benchmarks/results/pruning_quality.json with every seed's figure, the mean and a 95% interval.
Run: python benchmarks/cases/pruning_quality.py [--seeds 3] [--bytes 200000]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import gossamer as gs
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed import calibration_batches, heldout_text, language_model

OUT = Path(__file__).parents[1] / "results" / "pruning_quality.json"
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by number of seeds
PATTERNS = {
    "unstructured 50%": (None, 0.5),
    "unstructured 70%": (None, 0.3),
    "2:4": (gs.NM(2, 4), None),
}


def methods(seed: int) -> dict[str, object]:
    return {
        "sparsegpt": gs.weights.SparseGPT(),
        "wanda": gs.weights.Wanda(),
        "wanda, tensor scope": gs.weights.Wanda(),
        "magnitude": gs.weights.Magnitude(),
        "random": gs.weights.Random(seed=seed),
    }


def measure(name: str, pattern: object, density: float | None, seed: int, text: bytes) -> float:
    model = language_model()
    data = calibration_batches(n=128, length=256, seed=seed)
    if name.endswith("tensor scope"):
        pattern = gs.Unstructured("tensor")
    result = gs.prune(model, methods(seed)[name], pattern=pattern, density=density, data=data)
    asked = 0.5 if density is None else density
    assert abs(result.measured_density - asked) < 1e-3, result.measured_density
    return bits_per_byte(model, text)


def summary(values: list[float]) -> dict[str, object]:
    return {
        "seeds": values,
        "mean": statistics.mean(values),
        "interval95": None
        if len(values) < 2
        else STUDENT_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, choices=[1, *STUDENT_95])
    parser.add_argument("--bytes", type=int, default=200_000)
    args = parser.parse_args()
    seeds, text = range(args.seeds), heldout_text()[: args.bytes]
    record: dict[str, object] = {
        "metric": "bits per byte on the bundled held-out text, windows of 256; lower is better",
        "dense": bits_per_byte(language_model(), text),
        "seeds": list(seeds),
        "held_out_bytes": len(text),
        "machine": machine(),
    }
    for label, (pattern, density) in PATTERNS.items():
        figures: dict[str, Any] = {}
        for name in methods(0):
            if pattern is not None and name.endswith("tensor scope"):
                continue  # N:M ranks inside groups: there is no scope
            # magnitude sees no data: every seed is the same
            chosen = seeds if name != "magnitude" else [0]
            values = [measure(name, pattern, density, seed, text) for seed in chosen]
            figures[name] = summary(values)
            print(label, name, values, flush=True)
        order = [figures[name]["mean"] for name in ("sparsegpt", "wanda", "magnitude", "random")]
        record[label] = {**figures, "order_holds": order == sorted(order)}
    OUT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
