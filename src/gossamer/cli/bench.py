"""gossamer bench."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gossamer.bench import active, conv, decode, kernels, spgemm, training
from gossamer.bench.measure import Limits, measure_limits
from gossamer.cli.output import note, print_json, print_table
from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch

SUITES = ("kernels", "decode", "active", "spgemm", "conv", "training")


@dataclass
class Bench:
    """Check the kernels, then time them against the engines installed here.

    Example: gossamer bench --suite kernels --json
    """

    suite: str = "kernels"
    """kernels: single layers; decode: a whole model's decoding loop; active: inputs with zeros;
    spgemm: sparse times sparse; conv: MobileNet-v1's geometry and 3x3 layers; training: steps of
    an MLP"""
    geometry: str = "llama-1b"
    """of --suite decode: llama-1b or llama-160m, random weights"""
    only: str = ""
    """of all suites but decode: only cases whose description holds this text, such as 'batch 128'"""
    repeats: int = 7
    """turns of each engine; the median counts"""
    out: str = ""
    """also write the JSON to this file"""
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Measure, print, and write if asked."""
        if self.suite not in SUITES:
            raise UsageError(f"--suite is one of {', '.join(SUITES)}, not {self.suite!r}")
        if self.repeats < 1:
            raise UsageError(f"--repeats is at least 1, not {self.repeats}")
        limits = measure_limits()
        note(f"limits: {limits.read / 1e9:.1f} GB/s read, {limits.flops / 1e9:.0f} GFLOP/s float32")
        results = self._decode(limits) if self.suite == "decode" else self._cases(limits)
        record = {
            "suite": self.suite,
            "limits": dataclasses.asdict(limits),
            "kernels": _dispatch.describe(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "cases": results,
        }
        if self.out:
            Path(self.out).write_text(json.dumps(record, indent=2) + "\n")
        if self.json:
            print_json(record)
        else:
            self._print(results)

    def _cases(self, limits: Limits) -> list[dict[str, Any]]:
        suites = {"kernels": kernels, "active": active, "spgemm": spgemm, "conv": conv}
        suite: Any = {**suites, "training": training}[self.suite]
        chosen = [case for case in suite.cases() if self.only in describe(vars(case))]
        if not chosen:
            raise UsageError(f"--only {self.only!r} leaves no case")
        results = []
        for index, case in enumerate(chosen, 1):
            note(f"{index} of {len(chosen)}: {describe(vars(case))}")
            results.append(suite.measure(case, limits, self.repeats))
        return results

    def _decode(self, limits: Limits) -> list[dict[str, Any]]:
        note(f"{self.geometry} at density 0.5")
        return [decode.measure(self.geometry, 0.5, limits, self.repeats)]

    def _print(self, results: list[dict[str, Any]]) -> None:
        rows = []
        for result in results:
            times = result.get("milliseconds") or result["tokens_per_second"]
            share = f"{result['fraction_of_limit']:.2f} of {result['limit']}"
            ours, ratio = f"{times['gossamer']:.3g}", f"{result['ratio']:.2f}x"
            rows.append((describe(result["case"]), ours, ratio, _peer(result, times), share))
        unit = "tokens/s" if self.suite == "decode" else "ms"
        header = ("case", f"ours, {unit}", "ratio", f"best peer, {unit}", "of the limit")
        print_table(f"gossamer bench --suite {self.suite}", header, rows)


def _peer(result: dict[str, Any], times: dict[str, float]) -> str:
    """The dense engine that the ratio is to; the JSON has the others."""
    name = result.get("best_dense", "transformers dense bfloat16")
    return f"{times[name]:.3g} ({name.replace(' dense', '')})"


def describe(case: dict[str, Any]) -> str:
    """One line for a case."""
    if "name" in case:
        return str(case["name"])
    if "geometry" in case:
        return f"{case['geometry']} {case['dtype']} density {case['density']:g} batch 1"
    if "layers" in case:
        return (
            f"{case['layers']} layers {case['width']}x{case['width']} "
            f"density {case['density']:g} batch {case['batch']}"
        )
    block = f" block {case['block']}" if case.get("block") else ""
    return (
        f"{case['out']}x{case['inputs']} {case['dtype']} density {case['density']:g} "
        f"batch {case['batch']}{block}"
    )
