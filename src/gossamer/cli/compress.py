"""gossamer compress: prune, keep the masks, save small, reload, run faster, and measure it all."""

from __future__ import annotations

import glob
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gossamer.api_activations import method_of
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
    source_dtype,
)
from gossamer.cli.latency import latency_named
from gossamer.cli.methods import USE
from gossamer.cli.options import Share, fraction
from gossamer.cli.output import print_json, print_table, print_text
from gossamer.compression import Experiment
from gossamer.core.errors import UsageError
from gossamer.core.pattern import NM, parse_pattern
from gossamer.engine.measure.tasks import task_of
from gossamer.engine.progress import track
from gossamer.io.atomic import check_target
from gossamer.methods import build, parts
from gossamer.ops.quantized import BITS
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
    """scorer or solver, with its options, such as wanda, sparsegpt:block=64 or
    dsnot:start=sparsegpt,start.block=64; `gossamer methods weights` lists them"""
    pattern: str = "unstructured"
    """where zeros may lie: unstructured, unstructured:row, 2:4, 4:8, block:4x1, channel:1"""
    sparsity: Share | None = None
    """fraction of weights to remove, such as 0.7 or 70%; 0.5 unless the pattern says otherwise"""
    density: Share | None = None
    """fraction of weights to keep, such as 0.3 or 30%, instead of --sparsity"""
    allocation: Literal[
        "uniform", "uniform+", "er", "erk", "erk+", "global", "lamp", "owl", "influence"
    ] = "uniform"
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
    activations: str | None = None
    """method that chooses the inputs of layers that each new token reads, such as
    teal:density=0.5; weights are then pruned only where --sparsity or --density asks for it"""
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
        plan = self._check()
        calibration, text = self._texts()
        subject = read_model(self.model, "float32")
        limit = eval_bytes(subject) if self.eval_bytes is None else self.eval_bytes
        task = task_of(subject, text[: limit or len(text)], progress=True)
        task.check(self.length, self.tokens)
        pruning = {
            "pattern": plan["pattern"], "allocation": self.allocation, "include": self.include,
            "exclude": self.exclude,
        }  # fmt: skip
        experiment = Experiment(
            plan["method"], pruning, DTYPES[self.dtype], self.bits, self.group,
            latency_named(self.latency) if self.bits is None else None, self.tokens, progress=True,
            activations=plan["activations"],
        )  # fmt: skip
        batches = task.calibration(calibration, self.samples, self.length, self.seed)
        journal = target.with_name(f".{target.name}.journal")
        report = experiment.measure(task, batches, plan["density"], plan["sweep"], journal)
        labels = {
            "model": self.model,
            "source": source_dtype(plan["folder"]),
            "out": self.out,
            "command": "gossamer " + " ".join(shlex.quote(word) for word in sys.argv[1:]),
        }
        with quiet(), track(None, True, f"saving {self.out}"):
            result = report.save(target, overwrite=self.overwrite, labels=labels)
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

    def _check(self) -> dict[str, Any]:
        pattern = parse_pattern(self.pattern)
        density = density_of(self.sparsity, self.density)
        activations = None if self.activations is None else method_of(self.activations)
        if density is None and not isinstance(pattern, NM):
            density = 0.5 if activations is None else 1.0
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
            # weights that stay whole need no data to be ranked
            "method": _pruner("magnitude" if density == 1 else self.method),
            "pattern": None if default else pattern,
            "density": density,
            "activations": activations,
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
    if kind.card.role in ("replacer", "planner", "learned_mask"):
        raise UsageError(
            f"--method {kind.card.name} is used from Python: {USE[kind.card.role]}; choose a scorer "
            "or solver here (see gossamer methods weights)"
        )
    if kind.card.role not in ("scorer", "solver"):
        raise UsageError(
            f"--method {kind.card.name} makes a model sparse while it trains: use gossamer train, "
            "or a scorer or solver here (see gossamer methods weights)"
        )
    return build(text)
