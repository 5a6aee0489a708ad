"""gossamer compress: prune, keep the masks, save small, reload, run faster, and measure it all."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import glob
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gossamer.cli.compress_record import layers_of, record, source_dtype, work_of
from gossamer.cli.inputs import (
    BUNDLED,
    BUNDLED_TEXT,
    DTYPES,
    check_model,
    density_of,
    eval_bytes,
    quiet,
    read_model,
    read_text,
)
from gossamer.cli.latency import latency_named
from gossamer.cli.options import Share, fraction
from gossamer.cli.output import print_json, print_table, print_text
from gossamer.core.allocation import ALLOCATIONS
from gossamer.core.errors import UsageError
from gossamer.core.matrix import is_prunable
from gossamer.core.pattern import NM, Pattern, parse_pattern
from gossamer.core.result import CompressResult, PruneResult
from gossamer.engine.measure.tasks import Subject, Task, task_of
from gossamer.engine.progress import track
from gossamer.engine.prune.run import prune
from gossamer.engine.serve.compress import compress
from gossamer.io.atomic import check_target, new_folder
from gossamer.io.save import save
from gossamer.methods import build, parts
from gossamer.ops.quantized import BITS
from gossamer.report.html import render
from gossamer.report.notes import notes, title
from gossamer.report.tables import headline


@dataclass
class Compress:
    """Prune a model, pack it, measure quality, size and speed, and write model and report.

    Example: gossamer compress HuggingFaceTB/SmolLM2-135M --sparsity 50% --data notes/ --out small
    """

    PLACES = ("model",)

    model: str = BUNDLED
    """language model or text encoder: a Hugging Face folder, a hub name such as
    HuggingFaceTB/SmolLM2-135M (from the local cache first), or testbed:lm"""
    method: str = "sparsegpt"
    """scorer or solver, with its options, such as wanda or sparsegpt:block=64; `gossamer methods
    weights` lists them"""
    pattern: str = "unstructured"
    """where zeros may lie: unstructured, unstructured:row, 2:4, 4:8, block:4x1, channel:1"""
    sparsity: Share | None = None
    """fraction of weights to remove, such as 0.7 or 70%; 0.5 unless the pattern says otherwise"""
    density: Share | None = None
    """fraction of weights to keep, such as 0.3 or 30%, instead of --sparsity"""
    allocation: Literal["uniform", "uniform+", "er", "erk", "global", "lamp", "owl"] = "uniform"
    """how the density is shared among layers"""
    include: list[str] = field(default_factory=list)
    """further layers to prune, by name patterns such as '*embed*'; repeatable, or comma separated"""
    exclude: list[str] = field(default_factory=list)
    """layers to leave as they are, by name patterns such as '*down_proj'; repeatable, or comma
    separated"""
    data: str = BUNDLED_TEXT
    """calibration text: a file, a folder of text files, or testbed:text"""
    eval_data: str | None = None
    """held-out text for the quality: a file or folder; by default the last tenth of --data, and the
    bundled text for testbed:text"""
    eval_bytes: int | None = None
    """bytes of that text to measure on, 0 for all; by default 40000 for models with a tokenizer and
    all for the bundled one"""
    samples: int = 128
    """windows of text to calibrate with"""
    length: int = 256
    """tokens in a calibration window"""
    seed: int = 0
    """seed of the calibration windows"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the written weights, whatever that of the source, and of both models when timed"""
    bits: int | None = None
    """also round the kept weights to integers of 4 or 8 bits, a language model's head to 8"""
    group: int = 128
    """with --bits, columns that share a scale: a power of two from 64 on"""
    latency: str = "auto"
    """what chooses the kernels: auto (what `gossamer calibrate` measured, else short timings), rule,
    or the file of another calibration"""
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
        target = Path(self.out).resolve()  # now: the current folder may be the one replaced
        plan = {**self._check(), "target": target}
        calibration, text = self._texts()
        subject = read_model(self.model, "float32")
        limit = eval_bytes(subject) if self.eval_bytes is None else self.eval_bytes
        task = task_of(subject, text[: limit or len(text)], progress=True)
        task.check(self.length, self.tokens)
        plan["latency"] = latency_named(self.latency) if self.bits is None else None
        batches = task.calibration(calibration, self.samples, self.length, self.seed)
        dense = subject.model
        _round(dense, self._store)
        work = work_of(dense, batches[0])
        points = {d: self._point(task, dense, batches, plan, d)[2] for d in plan["sweep"]}
        pruned, packed, point = self._point(task, dense, batches, plan, plan["density"])
        points[plan["density"]] = point
        quality = {"dense": task.quality(dense, dense), "sparse": point["quality"]}
        _cast(dense, self._store)
        result = {
            "model": self.model,
            **record(pruned, packed, task, quality, work, self._store, self.bits),
            "allocation": self.allocation,
            "source": source_dtype(plan["folder"]),
            "dtype": self.dtype,
            "sweep": list(points.values()) if plan["sweep"] else [],
            "speed": dataclasses.asdict(task.speed(dense, packed, self.tokens)),
            "out": self.out,
        }
        with quiet(), track(None, True, f"saving {self.out}"):
            self._write(result, packed, subject, pruned, target)
        for left in _journals(target):
            shutil.rmtree(left, ignore_errors=True)
        if self.json:
            print_json(result)
        else:
            self._print(result)

    def again(self) -> str:
        """What a second call makes of an interrupted one."""
        kept = _journals(Path(self.out).resolve())
        return "; the same command resumes the run" if kept else ""

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
        if self.bits not in (None, *BITS):
            raise UsageError(f"--bits is 4 or 8, not {self.bits}")
        if self.group < 64 or self.group & (self.group - 1):
            raise UsageError(f"--group is a power of two from 64 on, not {self.group}")
        if self.samples < 1 or self.length < 2 or self.tokens < 1:
            raise UsageError("--samples and --tokens are at least 1, --length at least 2")
        try:
            sweep = [fraction(word) for word in self.sweep.split(",") if word.strip()]
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
        if self.eval_bytes is not None and self.eval_bytes < 0:
            raise UsageError(f"--eval-bytes is 0 (all) or more, not {self.eval_bytes}")
        default = self.pattern.strip().lower() == "unstructured"
        return {
            "method": _pruner(self.method),
            "pattern": None if default else pattern,
            "density": density,
            "sweep": further,
            "folder": check_model(self.model),
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
            include=self.include,
            exclude=self.exclude,
            progress=True,
        )

    def _point(
        self,
        task: Task,
        dense: nn.Module,
        batches: list[dict[str, torch.Tensor]],
        plan: dict[str, Any],
        density: float | None,
    ) -> tuple[PruneResult, CompressResult, dict[str, float]]:
        """One density, pruned, rounded as stored, measured and packed.

        Quality is that of the stored weights, computed in float32 with plain dense products: where
        the processor lacks bfloat16 arithmetic that is several times faster, and no less exact.
        """
        target: Path = plan["target"]
        label = "" if density == plan["density"] else f"-{density:.6f}"
        journal = target.with_name(f".{target.name}.journal{label}")
        pruned = self._prune(copy.deepcopy(dense), batches, plan, density, journal)
        _round(pruned.model, self._store)
        if self.bits is None:
            quality = task.quality(dense, pruned.model)
            _cast(pruned.model, self._store)
            packed = compress(pruned, latency=plan["latency"], exclude=self._unpacked(dense))
        else:
            _cast(pruned.model, self._store)  # so that dense bytes are those of the stored dtype
            packed = compress(
                pruned, bits=self.bits, group=self.group, exclude=self._unpacked(dense)
            )
            _cast(pruned.model, torch.float32)
            quality = task.quality(dense, pruned.model)
            _cast(pruned.model, self._store)
        stored = sum(layer.sparse_bytes for layer in layers_of(pruned, packed))
        point = {"density": pruned.measured_density, "quality": quality, "bytes": stored}
        return pruned, packed, point

    def _unpacked(self, model: nn.Module) -> list[str]:
        """The patterns of --exclude that name layers which could be packed."""
        names = [name for name, module in model.named_modules() if is_prunable(module)]
        return [each for each in self.exclude if fnmatch.filter(names, each)]

    def _write(
        self,
        result: dict[str, Any],
        packed: CompressResult,
        subject: Subject,
        pruned: PruneResult,
        target: Path,
    ) -> None:
        with new_folder(target, self.overwrite) as place:
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
        print_table(title(result), ("", "dense", "sparse", "ratio"), headline(result))
        for line in notes(result):
            print_text(line)
        print(f"wrote {self.out}/ with report.html")


def _journals(target: Path) -> list[Path]:
    """What interrupted runs for this folder have kept."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.journal*"))


def _pruner(text: str) -> Any:
    """The method by name and options; raises UsageError for one that trains."""
    kind, _ = parts(text)
    if kind.card.role not in ("scorer", "solver"):
        raise UsageError(
            f"--method {kind.card.name} makes a model sparse while it trains: use gossamer train, "
            "or a scorer or solver here (see gossamer methods weights)"
        )
    return build(text)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter to what `dtype` can hold, still float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
