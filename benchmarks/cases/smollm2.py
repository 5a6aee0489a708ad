"""SmolLM2-135M at 50%, unstructured and 2:4: quality, bytes, decoding, time and memory of the whole path.

SparseGPT and Wanda over three seeds of the calibration windows, Magnitude once (it reads no data).
The same figures settle the claims of SparseGPT and Wanda, so their records are written as well.
Every part runs in a process of its own, so that its peak memory is its own, and is written at once:
a run that was stopped goes on with the parts that are missing. Needs the model
(`gossamer testbed fetch smollm2`). Writes benchmarks/results/smollm2.json.
Run: python benchmarks/cases/smollm2.py [--only sparsegpt] [--fresh]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import gossamer as gs
from gossamer.bench.measure import measure_limits, when_calm
from gossamer.claims import load, write
from gossamer.claims.language import (
    HELD_OUT,
    METHODS,
    PATTERNS,
    SAMPLES,
    WINDOW,
    cast,
    figure,
    subject,
)
from gossamer.claims.ledger import check
from gossamer.core.confidence import interval
from gossamer.engine.measure.evaluate import bits_per_byte, decode_speed
from gossamer.engine.measure.tasks import Language, Subject
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed import calibration_text, heldout_text
from gossamer.testbed.packaged import folder

OUT = Path(__file__).parents[1] / "results" / "smollm2.json"
CLAIMS = OUT.parent / "claims"
NAMES = [figure(name, pattern) for pattern in PATTERNS for name in METHODS]
SEEDS = (0, 1, 2)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured; a record made with another plan is not continued."""

    samples: int = SAMPLES
    length: int = WINDOW
    window: int = WINDOW
    held_out_bytes: int = HELD_OUT
    new_tokens: int = 64
    repeats: int = 5
    patience: float = 60.0
    density: float = 0.5

    @property
    def text(self) -> bytes:
        return heldout_text()[: self.held_out_bytes]


def quality(model: torch.nn.Module, on: Subject, plan: Plan) -> float:
    return bits_per_byte(model, plan.text, window=plan.window, encode=on.encode)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def timed(steps: dict[str, dict[str, float]], name: str, call: Callable[[], T]) -> T:
    """Wall-clock and processor seconds: where they differ by more than threads, others worked."""
    start, used = time.perf_counter(), time.process_time()
    found = call()
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    steps[name] = {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}
    print(f"  {name}: {wall:.1f} s, {cpu:.1f} s of processors", file=sys.stderr, flush=True)
    return found


def dense(plan: Plan) -> dict[str, Any]:
    """The model as it came."""
    steps: dict[str, dict[str, float]] = {}
    on = timed(steps, "load", lambda: subject(torch.float32))
    bits = timed(steps, "quality", lambda: quality(on.model, on, plan))
    return {"bits_per_byte": bits, "folder_bytes": folder_bytes(folder("smollm2")), "steps": steps}


def compressed(plan: Plan, name: str, pattern: str, seed: int) -> dict[str, Any]:
    """Prune in float32, measure the weights as stored in bfloat16, pack, save."""
    steps: dict[str, dict[str, float]] = {}
    on = timed(steps, "load", lambda: subject(torch.float32))
    model, method = on.model, METHODS[name]()
    data = Language(on, plan.text).calibration(calibration_text(), plan.samples, plan.length, seed)
    how = {"density": plan.density, "pattern": pattern, "data": data}
    result = timed(steps, "prune", lambda: gs.prune(model, method, **how))
    assert abs(result.measured_density - plan.density) < 1e-3, result.measured_density
    cast(model, torch.bfloat16)
    cast(model, torch.float32)
    bits = timed(steps, "quality", lambda: quality(model, on, plan))
    cast(model, torch.bfloat16)
    packed = timed(steps, "pack", lambda: gs.compress(result, latency="rule"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "small"
        timed(steps, "save", lambda: gs.save(packed, folder, tokenizer=on.tokenizer))
        size = folder_bytes(folder)
    return {"bits_per_byte": bits, "folder_bytes": size, "steps": steps}


def decoding(plan: Plan) -> dict[str, Any]:
    """Tokens per second in bfloat16, all three in turns; which weights are zero does not matter."""
    full, small = subject(torch.bfloat16), subject(torch.bfloat16)
    gs.compress(gs.prune(small.model, gs.weights.Magnitude(), density=plan.density), latency="rule")
    ids = full.ids(plan.text[:4096])[:32].unsqueeze(0)

    def measure() -> dict[str, Any]:
        return vars(decode_speed(full.model, small.model, ids, plan.new_tokens, plan.repeats))

    found = when_calm(measure, plan.patience, measure_limits().flops)
    return {"prompt": ids.shape[1], "new_tokens": plan.new_tokens, **found}


def parts() -> list[str]:
    """Those that say most come first."""
    runs, later = (
        [f"{figure(name, x)}, seed {seed}" for seed in SEEDS for name in ("sparsegpt", "wanda")]
        for x in PATTERNS
    )
    once = ["magnitude 2:4, seed 0"]
    return ["dense", "magnitude, seed 0", *runs[:2], "decoding", *runs[2:], *once, *later]


def part(label: str, plan: Plan) -> dict[str, Any]:
    """One part, in this process."""
    if label in ("dense", "decoding"):
        found = dense(plan) if label == "dense" else decoding(plan)
    else:
        name, seed = label.split(", seed ")
        name, _, pattern = name.partition(" ")
        found = compressed(plan, name, pattern or "unstructured", int(seed))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "peak_memory_bytes": peak, "machine": machine()}


def apart(label: str, plan: Plan) -> dict[str, Any]:
    """One part, in a child process."""
    command = [sys.executable, __file__, "--part", label, "--plan", json.dumps(vars(plan))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Mean and 95% interval of the bits per byte, by method."""
    rows: dict[str, Any] = {}
    for name in NAMES:
        values = [
            one["bits_per_byte"] for label, one in found.items() if label.startswith(f"{name}, ")
        ]
        if values:
            rows[name] = {"bits_per_byte": statistics.fmean(values), "seeds": len(values)}
        if len(values) > 1:
            rows[name]["interval95"] = interval(values).half
    return rows


def settle(found: dict[str, Any]) -> None:
    """The records of the claims that these parts decide."""

    def one(seed: int, short: bool) -> dict[str, float]:
        figures = {"dense": found["dense"]["bits_per_byte"]}
        for name in NAMES:
            part = found.get(f"{name}, seed {seed}") or found[f"{name}, seed 0"]
            figures[name] = part["bits_per_byte"]
        return figures

    for name in ("sparsegpt", "wanda"):
        record = check(dataclasses.replace(load(name), one=one))
        write(record | {"machine": found["dense"]["machine"]}, CLAIMS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="parts whose name holds this text")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--plan", default="{}", help='other numbers, such as {"samples": 4}')
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    plan = Plan(**json.loads(args.plan))
    if args.part:
        print(json.dumps(part(args.part, plan)))
        return
    folder("smollm2")  # says at once how to fetch it
    record: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, weights that were 4-bit integers, in bfloat16",
        "metric": "bits per byte on the first bytes of the bundled held-out text (Python's "
        "documentation), in float32; lower is better",
        "plan": vars(plan),
        "parts": {},
    }
    if args.out.exists() and not args.fresh:
        old = json.loads(args.out.read_text())
        record["parts"] = old["parts"] if old["plan"] == vars(plan) else {}
    for label in parts():
        if label in record["parts"] or args.only not in label:
            continue
        print(label, file=sys.stderr, flush=True)
        record["parts"][label] = apart(label, plan)
        record["summary"] = summary(record["parts"])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if args.out == OUT and set(record["parts"]) >= set(parts()):
        settle(record["parts"])
    print(json.dumps(record.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
