"""The whole path in one call: prune, pack, measure quality, size and speed, save with a report."""

from __future__ import annotations

import copy
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gossamer.api import prune
from gossamer.api_activations import calibrate_activations
from gossamer.core.matrix import is_prunable
from gossamer.core.pattern import Pattern
from gossamer.core.result import CompressResult, PruneResult
from gossamer.engine.data import Batch
from gossamer.engine.inputs.activations.plan import text_of
from gossamer.engine.measure.record import layers_of, record, work_of
from gossamer.engine.measure.tasks import Subject, Task, is_causal, task_of
from gossamer.engine.protocols import Allocation, Method
from gossamer.engine.serve.compress import compress
from gossamer.io.atomic import new_folder
from gossamer.io.save import save_inside
from gossamer.nn.kernel_choice.latency import LatencyModel
from gossamer.nn.packed.active import ActiveLinear
from gossamer.report.html import render
from gossamer.report.notes import notes, title
from gossamer.report.tables import headline


@dataclass(frozen=True)
class CompressionReport:
    """What `measure_compression` found, with the model it made.

    Parameters
    ----------
    pruned, packed : PruneResult, CompressResult
        The model before and after packing; `packed.model` is the one to use.
    facts : mapping
        Every figure as plain data: quality, bytes, FLOPs, speed, coverage, layers and machine.
    tokenizer : object, optional
        Saved beside the model.
    """

    pruned: PruneResult
    packed: CompressResult
    facts: Mapping[str, Any]
    tokenizer: Any = field(default=None, repr=False)

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        labels: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write the model, result.json and report.html, all of it or nothing.

        Parameters
        ----------
        folder : path
            Where to; it must be empty or absent unless `overwrite`.
        overwrite : bool
            Replace what is there, once the new folder is complete.
        labels : mapping, optional
            What else is written down, such as `model`, its name in the report.

        Returns
        -------
        dict
            The facts with the labels and the bytes of the files.

        Raises
        ------
        UsageError
            Where the folder is not empty.
        """
        told = {**self.facts, **(labels or {})}
        told["bytes"] = dict(told["bytes"])
        with new_folder(Path(folder), overwrite) as place:
            facts = {**self.pruned.provenance, "method": self.pruned.method}
            if "command" in told:
                facts["command"] = told["command"]
            save_inside(self.packed, place, tokenizer=self.tokenizer, provenance=facts)
            told["bytes"]["files"] = sum(p.stat().st_size for p in place.glob("*.safetensors"))
            (place / "result.json").write_text(json.dumps(told, indent=2, default=str) + "\n")
            (place / "report.html").write_text(render(told))
        return told

    def __str__(self) -> str:
        """The headline figures and the notes, as lines of text."""
        rows = ["  ".join(cells) for cells in headline(self.facts)]
        return "\n".join([title(self.facts), *rows, *notes(self.facts)])


def measure_compression(
    model: nn.Module,
    calibration: bytes | str,
    heldout: bytes | str,
    *,
    tokenizer: Any = None,
    method: Method | str = "sparsegpt",
    pattern: Pattern | str | None = None,
    density: float | None = None,
    allocation: Allocation | str = "uniform",
    sweep: Sequence[float] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    samples: int = 128,
    length: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    bits: int | None = None,
    group: int = 128,
    latency: LatencyModel | Literal["rule"] | None = None,
    tokens: int = 64,
    journal: str | Path | None = None,
    progress: bool = False,
    activations: Any = None,
) -> CompressionReport:
    """Prune a copy of a language model or text encoder, pack it, and measure both side by side.

    This is what `gossamer compress` runs.

    Parameters
    ----------
    model : Module
        A model of transformers that reads text. It stays as it is.
    calibration, heldout : bytes or str
        Text to calibrate with, and other text to measure the quality on.
    tokenizer : object, optional
        The model's, as transformers gives it; None where a byte is a token.
    method, pattern, density, allocation, include, exclude
        As in `prune`. density is 0.5 where neither it nor an N:M pattern is given.
    sweep : sequence of float
        Further densities to measure quality and bytes at.
    samples, length, seed : int
        Windows of text to calibrate with, their tokens, and the seed that draws them.
    dtype : torch.dtype
        Of the packed weights: bfloat16 or float32.
    bits, group : int, optional
        Round the kept weights to integers of 4 or 8 bits with a scale per `group` columns.
    latency : LatencyModel or "rule", optional
        What chooses the kernels, as in `compress`.
    tokens : int
        Tokens to decode for the speed.
    journal : path, optional
        A folder in which finished blocks are kept, so that a killed run resumes.
    progress : bool
        Show how far it is on stderr.
    activations : InputScorer or str, optional
        Chooses the inputs that layers read for each new token, such as "teal:density=0.5". The
        quality is then that of a text in which every token chooses.

    Returns
    -------
    CompressionReport

    Raises
    ------
    UsageError, PatternError, NonFiniteError
        As `prune` does, and where the text is too short or tokens exceed the model's positions.

    Examples
    --------
    >>> import gossamer as gs, transformers
    >>> from pathlib import Path
    >>> model = transformers.AutoModelForCausalLM.from_pretrained("my-model")  # doctest: +SKIP
    >>> tokenizer = transformers.AutoTokenizer.from_pretrained("my-model")  # doctest: +SKIP
    >>> texts = Path("mine.txt").read_text(), Path("held-out.txt").read_text()  # doctest: +SKIP
    >>> report = gs.measure_compression(model, *texts, tokenizer=tokenizer)  # doctest: +SKIP
    >>> report.save("report.html")  # doctest: +SKIP
    """
    if density is None and pattern in (None, "unstructured"):
        density = 0.5
    told = {"pattern": pattern, "allocation": allocation, "include": include, "exclude": exclude}
    run = Experiment(method, told, dtype, bits, group, latency, tokens, progress, activations)
    texts = [x.encode() if isinstance(x, str) else x for x in (calibration, heldout)]
    subject = Subject(copy.deepcopy(model).eval(), tokenizer, is_causal(model))
    task = task_of(subject, texts[1], progress)
    task.check(length, tokens)
    batches = task.calibration(texts[0], samples, length, seed)
    return run.measure(task, batches, density, sweep, None if journal is None else Path(journal))


@dataclass(frozen=True)
class Experiment:
    """How models are pruned, stored and timed; `pruning` holds the other arguments of `prune`."""

    method: Method | str
    pruning: Mapping[str, Any]
    dtype: torch.dtype = torch.bfloat16
    bits: int | None = None
    group: int = 128
    latency: LatencyModel | Literal["rule"] | None = None
    tokens: int = 64
    progress: bool = False
    activations: Any = None

    def measure(
        self,
        task: Task,
        batches: Sequence[Batch],
        density: float | None,
        sweep: Sequence[float] = (),
        journal: Path | None = None,
    ) -> CompressionReport:
        """Everything that is measured; the task's model ends rounded to `dtype`."""
        dense = task.subject.model
        _round(dense, self.dtype)
        work = work_of(dense, batches[0])
        points = {d: self._point(task, batches, d, _beside(journal, d))[2] for d in sweep}
        pruned, packed, point = self._point(task, batches, density, journal)
        points[pruned.requested_density] = point
        quality = {"dense": task.quality(dense, dense), "sparse": point["quality"]}
        _cast(dense, self.dtype)
        facts = {
            **record(pruned, packed, task, quality, work, self.dtype, self.bits),
            "allocation": str(self.pruning.get("allocation") or "uniform"),
            "dtype": str(self.dtype).removeprefix("torch."),
            "activations": point.get("activations"),
            "sweep": list(points.values()) if sweep else [],
            "speed": asdict(task.speed(dense, packed, self.tokens)),
        }
        return CompressionReport(pruned, packed, facts, task.subject.tokenizer)

    def _point(
        self, task: Task, batches: Sequence[Batch], density: float | None, journal: Path | None
    ) -> tuple[PruneResult, CompressResult, dict[str, Any]]:
        """One density, pruned, rounded as stored, measured and packed.

        Quality is that of the stored weights, computed in float32 with plain dense products: where
        the processor lacks bfloat16 arithmetic that is several times faster, and no less exact.
        """
        dense = task.subject.model
        pruned = prune(
            copy.deepcopy(dense), self.method, density=density, data=batches, journal=journal,
            progress=self.progress, **self.pruning,
        )  # fmt: skip
        _round(pruned.model, self.dtype)
        unpacked = self._unpacked(dense)
        if self.activations is not None:
            return self._choosing(task, batches, pruned, unpacked)
        if self.bits is None:
            quality = task.quality(dense, pruned.model)
            _cast(pruned.model, self.dtype)
            packed = compress(pruned, latency=self.latency, exclude=unpacked)
        else:
            _cast(pruned.model, self.dtype)  # so that dense bytes are those of the stored dtype
            packed = compress(pruned, bits=self.bits, group=self.group, exclude=unpacked)
            _cast(pruned.model, torch.float32)
            quality = task.quality(dense, pruned.model)
            _cast(pruned.model, self.dtype)
        stored = sum(layer.sparse_bytes for layer in layers_of(pruned, packed))
        point = {"density": pruned.measured_density, "quality": quality, "bytes": stored}
        return pruned, packed, point

    def _choosing(
        self, task: Task, batches: Sequence[Batch], pruned: PruneResult, unpacked: list[str]
    ) -> tuple[PruneResult, CompressResult, dict[str, Any]]:
        """The rest of a point whose layers choose inputs; every token does for the quality."""
        plan = calibrate_activations(
            pruned.model, self.activations, batches, exclude=unpacked, progress=self.progress
        )
        _cast(pruned.model, self.dtype)
        options: dict[str, Any] = {"bits": self.bits, "group": self.group, "exclude": unpacked}
        packed = compress(pruned, latency=self.latency, activations=plan, **options)
        _cast(pruned.model, torch.float32)
        quality = task.quality(task.subject.model, pruned.model)
        _cast(pruned.model, self.dtype)
        for module in pruned.model.modules():
            if isinstance(module, ActiveLinear):
                module.to(self.dtype)
        stored = sum(layer.sparse_bytes for layer in layers_of(pruned, packed))
        point = {
            "density": pruned.measured_density, "quality": quality, "bytes": stored,
            "activations": {"method": text_of(plan.method), "density": plan.density},
        }  # fmt: skip
        return pruned, packed, point

    def _unpacked(self, model: nn.Module) -> list[str]:
        """The patterns to exclude that name layers which could be packed."""
        names = [name for name, module in model.named_modules() if is_prunable(module)]
        return [each for each in self.pruning.get("exclude", ()) if fnmatch.filter(names, each)]


def _beside(journal: Path | None, density: float) -> Path | None:
    return None if journal is None else journal.with_name(f"{journal.name}-{density:.6f}")


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter to what `dtype` can hold, in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
