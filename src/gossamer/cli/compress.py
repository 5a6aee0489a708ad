"""gossamer compress: prune, keep the masks, save small, reload, run faster, and measure it all."""

from __future__ import annotations

import copy
import dataclasses
import glob
import json
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.cli.costs import costs_named
from gossamer.cli.inputs import (
    BUNDLED,
    BUNDLED_TEXT,
    DTYPES,
    check_model,
    density_of,
    read_model,
    read_text,
)
from gossamer.cli.output import note, print_json, print_table
from gossamer.core.allocation import ALLOCATIONS
from gossamer.core.errors import UsageError
from gossamer.core.pattern import NM, Pattern, parse_pattern
from gossamer.core.result import CompressResult, LayerRecord, PruneResult
from gossamer.engine.compress import compress
from gossamer.engine.prune import prune
from gossamer.engine.tasks import Subject, Task, task_of
from gossamer.io.atomic import check_target, new_folder
from gossamer.io.save import save
from gossamer.methods import find
from gossamer.nn.costs import machine as this_machine
from gossamer.ops import _dispatch
from gossamer.ops.quantized import BITS
from gossamer.report.html import render
from gossamer.report.tables import headline


@dataclass
class Compress:
    """Prune a model, pack it, measure quality, size and speed, and write model and report.

    Example: gossamer compress --model testbed:lm --sparsity 0.5 --out gossamer-out
    """

    model: str = BUNDLED
    """folder of a Hugging Face causal language model or text encoder, or testbed:lm"""
    method: str = "sparsegpt"
    """see gossamer methods"""
    pattern: str = "unstructured"
    """unstructured, unstructured:row, 2:4, block:4x1, channel:1, ..."""
    sparsity: float | None = None
    """fraction of weights to remove, in [0, 1); 0.5 unless the pattern says otherwise"""
    density: float | None = None
    """fraction of weights to keep, instead of --sparsity"""
    allocation: str = "uniform"
    """uniform, uniform+, er, erk, global, lamp or owl"""
    data: str = BUNDLED_TEXT
    """calibration text: a file, a folder of text files, or testbed:text"""
    eval_data: str | None = None
    """held-out text for the quality: a file or folder; the bundled one for testbed:text"""
    samples: int = 128
    """calibration windows"""
    length: int = 256
    """tokens per calibration window"""
    seed: int = 0
    """of the calibration windows"""
    dtype: str = "bfloat16"
    """dtype of the written weights and of both models when timed: bfloat16 or float32"""
    bits: int | None = None
    """also round the kept weights to integers of 4 or 8 bits (a language model's head to 8)"""
    group: int = 128
    """columns that share a scale, with --bits: a power of two from 64 on"""
    costs: str = "auto"
    """what chooses the kernels: auto (by what `gossamer calibrate` measured, else by rule), rule, or
    the file of another calibration"""
    sweep: str = ""
    """further sparsities to measure, such as 0.3,0.5,0.7, for the quality-against-size chart"""
    tokens: int = 64
    """tokens to decode for the speed"""
    out: str = "gossamer-out"
    """folder to write; killed runs resume from a hidden folder beside it"""
    overwrite: bool = False
    """replace the folder if it is not empty"""
    json: bool = False
    """print one JSON object on stdout"""

    def run(self) -> None:
        """Check everything cheap, then work, then write the folder whole."""
        plan = self._check()
        calibration, text = self._texts()
        subject = read_model(self.model, "float32")
        task = task_of(subject, text)
        task.check(self.length, self.tokens)
        plan["costs"] = costs_named(self.costs) if self.bits is None else None
        batches = task.calibration(calibration, self.samples, self.length, self.seed)
        dense = subject.model
        _round(dense, self._store)
        note(f"quality of the dense model on {len(text)} bytes of held-out text")
        dense_quality = task.quality(dense, dense)
        target = Path(self.out).resolve()
        points = {}
        for density in plan["sweep"]:
            journal = target.with_name(f".{target.name}.journal-{density:.6f}")
            points[density] = self._point(task, dense, batches, plan, density, journal)[2]
        journal = target.with_name(f".{target.name}.journal")
        pruned, packed, point = self._point(task, dense, batches, plan, plan["density"], journal)
        points[plan["density"]] = point
        _cast(dense, self._store)
        speed = task.speed(dense, packed, self.tokens)
        result = self._record(plan, task, pruned, packed, dense_quality, point)
        result["sweep"] = list(points.values()) if plan["sweep"] else []
        result["speed"] = dataclasses.asdict(speed)
        self._write(result, packed, subject, pruned)
        for left in target.parent.glob(f".{glob.escape(target.name)}.journal*"):
            shutil.rmtree(left, ignore_errors=True)
        if self.json:
            print_json(result)
        else:
            self._print(result)

    @property
    def _store(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def _check(self) -> dict[str, Any]:
        pattern = parse_pattern(self.pattern)
        density = density_of(self.sparsity, self.density)
        if density is None and not isinstance(pattern, NM):
            density = 0.5
        if isinstance(pattern, NM) and density is not None:
            if abs(density - pattern.density) > 1e-9:
                raise UsageError(
                    f"--pattern {self.pattern} removes {1 - pattern.density:g} of the weights; "
                    "leave --sparsity out"
                )
            density = None
        if self.allocation not in ALLOCATIONS:
            raise UsageError(
                f"--allocation is one of {', '.join(ALLOCATIONS)}, not {self.allocation!r}"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise UsageError(f"--dtype is bfloat16 or float32, not {self.dtype!r}")
        if self.bits not in (None, *BITS):
            raise UsageError(f"--bits is 4 or 8, not {self.bits}")
        if self.group < 64 or self.group & (self.group - 1):
            raise UsageError(f"--group is a power of two from 64 on, not {self.group}")
        if self.samples < 1 or self.length < 2 or self.tokens < 1:
            raise UsageError("--samples and --tokens are at least 1, --length at least 2")
        try:
            sweep = [float(word) for word in self.sweep.split(",") if word.strip()]
        except ValueError:
            raise UsageError(
                f"--sweep is numbers such as 0.3,0.5,0.7, not {self.sweep!r}"
            ) from None
        for value in sweep:
            density_of(value, None)
        wanted = {round(1 - value, 9) for value in sweep}
        further = sorted(d for d in wanted if density is None or abs(d - density) > 1e-9)
        if sweep and isinstance(pattern, NM):
            raise UsageError(f"--sweep needs a pattern of any density, not {self.pattern}")
        check_target(Path(self.out), self.overwrite)
        check_model(self.model)
        default = self.pattern.strip().lower() == "unstructured"
        return {
            "method": _pruner(self.method),
            "pattern": None if default else pattern,
            "density": density,
            "sweep": further,
        }

    def _texts(self) -> tuple[bytes, bytes]:
        from gossamer.testbed import calibration_text, heldout_text

        calibration = read_text(self.data, "--data", calibration_text)
        if self.eval_data is not None:
            return calibration, read_text(self.eval_data, "--eval-data", heldout_text)
        if self.data == BUNDLED_TEXT:
            return calibration, heldout_text()
        cut = max(1, len(calibration) * 9 // 10)
        return calibration[:cut], calibration[cut:]

    def _prune(
        self,
        model: nn.Module,
        batches: list[dict[str, torch.Tensor]],
        plan: dict[str, Any],
        density: float | None,
        journal: Path | None,
    ) -> PruneResult:
        pattern: Pattern | None = plan["pattern"]
        allocation = ALLOCATIONS[self.allocation]()
        return prune(
            model,
            plan["method"],
            pattern=pattern,
            density=density,
            allocation=allocation,
            data=batches,
            journal=journal,
            progress=True,
        )

    def _point(
        self,
        task: Task,
        dense: nn.Module,
        batches: list[dict[str, torch.Tensor]],
        plan: dict[str, Any],
        density: float | None,
        journal: Path,
    ) -> tuple[PruneResult, CompressResult, dict[str, float]]:
        """One density, pruned, rounded as stored, measured and packed.

        Quality is that of the stored weights, computed in float32 with plain dense products: where
        the processor lacks bfloat16 arithmetic that is several times faster, and no less exact.
        """
        pruned = self._prune(copy.deepcopy(dense), batches, plan, density, journal)
        _round(pruned.model, self._store)
        if self.bits is None:
            quality = task.quality(dense, pruned.model)
            _cast(pruned.model, self._store)
            packed = compress(pruned, costs=plan["costs"])
        else:
            _cast(pruned.model, self._store)  # so that dense bytes are those of the stored dtype
            packed = compress(pruned, bits=self.bits, group=self.group)
            _cast(pruned.model, torch.float32)
            quality = task.quality(dense, pruned.model)
            _cast(pruned.model, self._store)
        stored = sum(layer.sparse_bytes for layer in _of(pruned, packed))
        point = {"density": pruned.measured_density, "quality": quality, "bytes": stored}
        return pruned, packed, point

    def _record(
        self,
        plan: dict[str, Any],
        task: Task,
        pruned: PruneResult,
        packed: CompressResult,
        dense_quality: float,
        point: dict[str, float],
    ) -> dict[str, Any]:
        ours = _of(pruned, packed)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in ours)
        kept = sum(s.count for s in pruned.supports.values())
        return {
            "method": pruned.method,
            "pattern": pruned.pattern,
            "allocation": self.allocation,
            "bits": self.bits,
            "requested_density": pruned.requested_density,
            "measured_density": pruned.measured_density,
            "layers": [dataclasses.asdict(layer) for layer in packed.layers],
            "quality": {
                "metric": task.metric,
                "better": task.better,
                "dense": dense_quality,
                "sparse": point["quality"],
            },
            "bytes": {
                "dense": sum(layer.dense_bytes for layer in ours),
                "sparse": point["bytes"],
                "what": f"weights of the pruned layers, dense in {self.dtype}, kept ones in "
                + (self.dtype if self.bits is None else f"integers of {self.bits} bits"),
            },
            "flops": {
                "dense": 2 * weights,
                "sparse": 2 * kept,
                "what": "per token, pruned layers",
            },
            "machine": machine(packed),
            "command": "gossamer " + " ".join(shlex.quote(word) for word in sys.argv[1:]),
            "out": self.out,
        }

    def _write(
        self, result: dict[str, Any], packed: CompressResult, subject: Subject, pruned: PruneResult
    ) -> None:
        with new_folder(Path(self.out).resolve(), self.overwrite) as place:
            inner = place / "model"
            facts = {**pruned.provenance, "method": pruned.method, "command": result["command"]}
            save(packed, inner, tokenizer=subject.tokenizer, provenance=facts)
            for path in list(inner.iterdir()):
                path.rename(place / path.name)
            inner.rmdir()
            files = sum(p.stat().st_size for p in place.glob("*.safetensors"))
            result["bytes"]["files"] = files
            (place / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
            (place / "report.html").write_text(render(result))

    def _print(self, result: dict[str, Any]) -> None:
        title = f"{self.model}: {result['method']}, {result['pattern']}"
        print_table(title, ("", "dense", "sparse", "ratio"), headline(result))
        refused = [layer for layer in result["layers"] if not layer["kernel"]]
        for layer in refused[:5]:
            print(f"stays dense: {layer['name']} ({layer['reason']})")
        if any(layer["predicted"] for layer in result["layers"]):
            print("kernels chosen by costs measured on this machine; report.html has them")
        print(f"wrote {self.out}/ with report.html")


def _pruner(name: str) -> Any:
    """The method by name, with its defaults; raises UsageError for one that trains."""
    method = find(name)
    if method.card.kind not in ("score", "solver"):
        raise UsageError(
            f"--method {name} chooses weights while a model trains; use gs.sparse_training in a "
            "training loop, or a method for trained models here (see gossamer methods)"
        )
    return method()


def machine(packed: CompressResult) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        **this_machine(),
        "isa": packed.isa,
        "kernels": _dispatch.describe(),
        "threads": packed.threads,
        "python": platform.python_version(),
    }


def _of(pruned: PruneResult, packed: CompressResult) -> list[LayerRecord]:
    """The packed records of the pruned layers."""
    chosen = {layer.name for layer in pruned.layers}
    return [layer for layer in packed.layers if layer.name in chosen]


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter to what `dtype` can hold, still float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
