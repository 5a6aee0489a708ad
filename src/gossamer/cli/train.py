"""gossamer train: train a sparse network, or compare ways to, and report what it cost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gossamer.cli.inputs import density_of
from gossamer.cli.methods import USE
from gossamer.cli.options import Share
from gossamer.cli.output import note, print_json, print_table
from gossamer.cli.train_result import log_step, record
from gossamer.cli.train_rounds import RoundsRun
from gossamer.cli.train_tasks import Images, Text, read_work
from gossamer.core.errors import MissingExtra, UsageError
from gossamer.core.files import write_whole
from gossamer.core.pattern import parse_pattern
from gossamer.core.words import listed
from gossamer.engine.progress import track
from gossamer.engine.protocols import GradientSource, Recipe
from gossamer.engine.train.fit import Fit, TrainingOptions
from gossamer.engine.train.flops import expected_flops, expected_query_flops, steps_for
from gossamer.engine.train.rounds import expected_rounds_flops
from gossamer.io.atomic import check_target, new_folder
from gossamer.io.save import save
from gossamer.methods import parts
from gossamer.nn.kernel_choice.machine import machine
from gossamer.ops.allocation import ALLOCATIONS
from gossamer.report.training import (
    SWEEP_HEADER,
    headline,
    render_run,
    render_sweep,
    sweep_rows,
)

OUTSIDE = ("out", "overwrite", "json", "log", "save_every")
"""Options that do not change what a run computes."""


@dataclass
class Train:
    """Train a sparse network from data, with checkpoints, and write model, figures and report.

    Example: gossamer train --data digits --model cnn --method rigl --density 0.1 --out trained
    """

    data: str = "digits"
    """digits, fashion-mnist:FOLDER, images:FOLDER, testbed:text, or a text file or folder"""
    model: str = "cnn"
    """cnn or mlp for images; testbed:lm or a Hugging Face folder for text"""
    scratch: bool = False
    """train a language model's architecture from random weights"""
    width: int = 0
    """of the small networks: first channels of the CNN (8), hidden units of the MLP (256)"""
    method: str = "rigl"
    """topology method, recipe or gradient source, with its options, such as
    rigl:every=50,drop=0.3; or dense"""
    density: Share | None = None
    """fraction of weights to keep, such as 0.1 or 10%; 0.1 unless the pattern says otherwise"""
    sparsity: Share | None = None
    """fraction of weights to remove, such as 0.9 or 90%, instead of --density"""
    pattern: str = ""
    """N:M such as 2:4, for the methods that train one"""
    allocation: Literal["uniform", "uniform+", "er", "erk", "erk+"] | None = None
    """how density is shared among layers; the method's own unless named"""
    include: list[str] = field(default_factory=list)
    """further layers to make sparse, by name patterns such as '*embed*'; repeatable, or comma separated"""
    exclude: list[str] = field(default_factory=list)
    """layers to leave dense, by name patterns such as '*head'; repeatable, or comma separated"""
    steps: int = 300
    """optimizer steps, of each training in rounds; with a sweep, those of the costliest variant"""
    batch: int = 64
    """images or text windows in a step"""
    length: int = 128
    """tokens in a text window"""
    optimizer: Literal["sgd", "adamw"] | None = None
    """sgd (with momentum 0.9) unless named for images, adamw for text"""
    lr: float | None = None
    """peak learning rate: 0.1 for sgd, 0.001 for adamw"""
    weight_decay: float | None = None
    """on matrices and kernels: 0.0005 for sgd, 0.1 for adamw"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """of the learning rate over the steps"""
    warmup: int = 0
    """steps of linear warm-up"""
    clip: float = 0.0
    """largest norm of the kept weights' gradient; 0 does not clip"""
    seed: int = 0
    """of weights, batches, supports, and of the split of digits and image folders"""
    save_every: int = 50
    """steps between checkpoints"""
    log: str = ""
    """folder for TensorBoard event files; none if empty"""
    sweep_methods: str = ""
    """compare these, such as dense,set,rigl:every=50,drop=0.3, at equal training FLOPs"""
    sweep_density: str = ""
    """densities of the comparison, such as 0.05,0.1"""
    seeds: int = 1
    """seeds of the comparison, from --seed upward"""
    out: str = "gossamer-train"
    """folder to write; a killed run resumes from a hidden folder beside it"""
    overwrite: bool = False
    """replace the folder if it is not empty"""
    json: bool = False
    """print one JSON object on stdout"""

    def run(self) -> None:
        """Check everything cheap, then train, then write the folder whole."""
        check_target(Path(self.out), self.overwrite)
        if self.save_every < 1 or self.seeds < 1:
            raise UsageError("--save-every and --seeds are at least 1")
        variants = self._arms()
        if self.seeds > 1 and not self._sweeps:
            raise UsageError("--seeds belongs to a comparison: give --sweep-methods too")
        with self._writer() as writer:
            if self._sweeps:
                self._sweep(variants, writer)
            else:
                self._single(*variants[0], writer)
        shutil.rmtree(self._hidden, ignore_errors=True)

    def again(self) -> str:
        """What a second call makes of an interrupted one."""
        return "; the same command resumes the run" if self._hidden.exists() else ""

    @property
    def _sweeps(self) -> bool:
        return bool(self.sweep_methods or self.sweep_density)

    @property
    def _hidden(self) -> Path:
        target = Path(self.out).resolve()
        return target.with_name(f".{target.name}.train")

    def _arms(self) -> list[tuple[str, float | None]]:
        """The methods and densities to train, each checked by constructing the method."""
        density = density_of(self.sparsity, self.density)
        names = listed(self.sweep_methods) or [self.method]
        try:
            densities: list[float | None] = [float(x) for x in listed(self.sweep_density)]
        except ValueError:
            raise UsageError(
                f"--sweep-density is numbers such as 0.05,0.1, not {self.sweep_density!r}"
            ) from None
        if densities and density is not None:
            raise UsageError("give --density or --sweep-density, not both")
        for value in densities:
            density_of(None, value)
        variants: list[tuple[str, float | None]] = []
        for name in names:
            free = name != "dense" and "density" in _fields(_method_parts(name)[0])
            for value in (densities or [density]) if free or not densities else [None]:
                self._method(name, value)
                variants.append((name, value))
        return variants

    def _method(self, name: str, density: float | None) -> Any:
        """The method's instance; None for dense training."""
        if name == "dense":
            return None
        kind, values = _method_parts(name)
        known = _fields(kind)
        for key in ("density", "pattern", "allocation"):
            if key in values:
                raise UsageError(f"--method {name}: give --{key} instead of the option {key}")
        if "density" in known:
            values["density"] = 0.1 if density is None else density
        elif density is not None:
            how = "give --pattern 2:4 or the like" if "pattern" in known else "see its page"
            raise UsageError(f"--method {name} has no density to ask for; leave --density out and "
                             f"{how}")  # fmt: skip
        if self.pattern and ("pattern" in known or not self.sweep_methods):
            if "pattern" not in known:
                raise UsageError(f"--pattern: {name} trains unstructured weights; leave it out")
            values["pattern"] = parse_pattern(self.pattern)
        if self.allocation and ("allocation" in known or not self.sweep_methods):
            if self.allocation not in ALLOCATIONS or "allocation" not in known:
                raise UsageError(f"--allocation {self.allocation}: {name} takes none of that name; "
                                 "choose uniform, uniform+, er, erk or erk+, or leave it out")  # fmt: skip
            values["allocation"] = ALLOCATIONS[self.allocation]()
        try:
            method = kind(**values)
        except TypeError as error:
            raise UsageError(f"--method {name}: {error}") from None
        if isinstance(method, Recipe) and (method.rewind or 0) >= self.steps:
            raise UsageError(f"--method {name} rewinds to a step before --steps {self.steps}")
        return method

    def _recipe(self, text: bool, steps: int) -> TrainingOptions:
        name = self.optimizer or ("adamw" if text else "sgd")
        lr, decay = {"adamw": (1e-3, 0.1)}.get(name, (0.1, 5e-4))
        return TrainingOptions(
            steps,
            lr if self.lr is None else self.lr,
            name,
            decay if self.weight_decay is None else self.weight_decay,
            self.schedule,
            self.warmup,
            self.clip,
        )

    def _work(self, seed: int) -> Images | Text:
        names = ("data", "model", "scratch", "width", "batch", "length")
        return read_work(**{name: getattr(self, name) for name in names}, seed=seed)

    def _fit(
        self, name: str, density: float | None, seed: int, steps: int, file: str, writer: Any
    ) -> tuple[nn.Module, list[float], dict[str, Any], Images | Text]:
        """One run from its checkpoint or its start to its end, and what came out."""
        work, method = self._work(seed), self._method(name, density)
        options = dataclasses.asdict(self)
        fingerprint = {k: v for k, v in options.items() if k not in OUTSIDE}
        fingerprint.update(run=[name, density, seed, steps], content=work.digest())
        prefix = f"{name}-{density}-{seed}/" if self._sweeps else ""
        if isinstance(method, Recipe):
            rounds = RoundsRun(
                work, method, self._recipe(isinstance(work, Text), steps), seed,
                self.include, self.exclude, (self._hidden / file).with_suffix(""), fingerprint,
                self.save_every, writer, prefix,
            )  # fmt: skip
            return *rounds.train(name, density), work
        source = method if isinstance(method, GradientSource) else None
        fit = Fit(
            work.build(seed),
            None if source is not None else method,
            lambda model, step: work.loss(model, step, seed),
            self._recipe(isinstance(work, Text), steps),
            include=self.include,
            exclude=self.exclude,
            seed=seed,
            source=source,
        )
        with track(steps, True, f"{name} {seed}") as step:
            seen = 0

            def report(fit: Fit) -> None:
                nonlocal seen
                for _ in range(fit.step - seen):
                    step(f"loss {fit.losses[-1]:.4f}  density {fit.density:.4f}")
                seen = fit.step
                if writer is not None:
                    log_step(writer, fit, prefix)

            fit.train(self._hidden / file, fingerprint, self.save_every, report)
        return fit.model, fit.losses, record(fit, work, name, density, seed), work

    def _single(self, name: str, density: float | None, writer: Any) -> None:
        model, losses, result, work = self._fit(
            name, density, self.seed, self.steps, "checkpoint.safetensors", writer
        )
        result.update(self._facts())
        curve = list(enumerate(losses, 1))
        result["loss"]["curve"] = curve[:: max(1, len(curve) // 400)]
        with new_folder(Path(self.out).resolve(), self.overwrite) as place:
            inner = place / "model"
            tokenizer = work.tokenizer if isinstance(work, Text) else None
            save(model, inner, tokenizer=tokenizer, provenance={"method": result["method"]})
            for path in list(inner.iterdir()):
                path.rename(place / path.name)
            inner.rmdir()
            (place / "report.html").write_text(render_run(result))
            (place / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        if self.json:
            print_json(result)
            return
        print_table(f"{name} on {self.data}, {self.steps} steps", ("", "value"), headline(result))
        note(f"wrote {self.out}: model, result.json, report.html")

    def _sweep(self, variants: list[tuple[str, float | None]], writer: Any) -> None:
        work = self._work(self.seed)
        model = work.build(self.seed)
        loss = partial(_first_loss, work, self.seed)

        def cost(variant: tuple[str, float | None], steps: int) -> float:
            method, names = (
                self._method(*variant),
                {"include": self.include, "exclude": self.exclude},
            )
            if isinstance(method, Recipe):
                return expected_rounds_flops(model, method, steps, loss, **names)
            if isinstance(method, GradientSource):
                return expected_query_flops(model, method, steps, loss)
            return expected_flops(model, method, steps, loss, **names)

        budget = max(cost(variant, self.steps) for variant in variants)
        result: dict[str, Any] = {
            **self._facts(), "metric": work.metric, "better": work.better,
            "budget_flops": budget, "seeds": [self.seed + k for k in range(self.seeds)],
            "variants": [],
        }  # fmt: skip
        for name, density in variants:
            steps = steps_for(budget, self.steps, partial(cost, (name, density)))
            runs = [self._arm(name, density, seed, steps, writer) for seed in result["seeds"]]
            result["variants"].append(
                {"method": name, "density": density, "steps": steps, "runs": runs}
            )
        with new_folder(Path(self.out).resolve(), self.overwrite) as place:
            (place / "report.html").write_text(render_sweep(result))
            (place / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        if self.json:
            print_json(result)
            return
        print_table(f"{work.metric} ({work.better} is better) at equal training FLOPs",
                    SWEEP_HEADER, sweep_rows(result))  # fmt: skip
        note(f"wrote {self.out}: result.json, report.html")

    def _arm(
        self, name: str, density: float | None, seed: int, steps: int, writer: Any
    ) -> dict[str, Any]:
        """One run of the sweep; read from disk where the same command finished it already."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in OUTSIDE}
        label = re.sub(r"[^\w.,=-]+", "-", f"{name}-{density}-{seed}")
        done = self._hidden / f"{label}.json"
        if done.exists():
            kept = json.loads(done.read_text())
            if kept["options"] == json.loads(json.dumps(options)) and kept["steps"] == steps:
                run: dict[str, Any] = kept["run"]
                return run
        run = self._fit(name, density, seed, steps, f"{label}.safetensors", writer)[2]
        body = json.dumps({"options": options, "steps": steps, "run": run})
        write_whole(done, lambda path: path.write_text(body))
        return run

    def _facts(self) -> dict[str, Any]:
        return {
            "data": self.data, "model": self.model, "out": self.out,
            "command": "gossamer " + " ".join(shlex.quote(word) for word in sys.argv[1:]),
            "machine": {**machine(), "python": platform.python_version()},
        }  # fmt: skip

    @contextlib.contextmanager
    def _writer(self) -> Iterator[Any]:
        if not self.log:
            yield None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboard", "tensorboard") from None
        writer: Any = SummaryWriter(self.log)
        try:
            yield writer
        finally:
            writer.close()


def _method_parts(text: str) -> tuple[type[Any], dict[str, Any]]:
    kind, options = parts(text)
    if kind.card.role in ("replacer", "planner", "learned_mask"):
        raise UsageError(
            f"--method {kind.card.name} is used from Python: {USE[kind.card.role]}; choose a topology "
            "method or a recipe here (see gossamer methods weights)"
        )
    if kind.card.role not in ("topology", "recipe", "gradient_source"):
        raise UsageError(
            f"--method {kind.card.name} does not train: it is a {kind.card.role}; choose a topology "
            "method or a recipe of gossamer methods weights, or use gossamer compress"
        )
    return kind, options


def _fields(kind: type[Any]) -> tuple[str, ...]:
    return tuple(x.name for x in dataclasses.fields(kind))


def _first_loss(work: Images | Text, seed: int, model: nn.Module) -> torch.Tensor:
    return work.loss(model, 0, seed)
