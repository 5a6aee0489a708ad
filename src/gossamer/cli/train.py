"""gossamer train: train a sparse network, or compare ways to, and report what it cost."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gossamer.cli.inputs import density_of
from gossamer.cli.methods import USE
from gossamer.cli.options import Share
from gossamer.cli.output import note, print_json, print_table
from gossamer.cli.problems import read_problem
from gossamer.core.errors import UsageError
from gossamer.core.pattern import parse_pattern
from gossamer.core.words import listed
from gossamer.engine.protocols import Recipe
from gossamer.io.atomic import check_target
from gossamer.methods import parts
from gossamer.ops.allocation import ALLOCATIONS
from gossamer.report.training import SWEEP_HEADER, headline, sweep_rows
from gossamer.testbed.base import Problem
from gossamer.training import TrainingComparison, TrainingReport
from gossamer.training_runs import Training, Variant, options_for


@dataclass
class Train:
    """Train a sparse network from data, with checkpoints, and write model, figures and report.

    Example: gossamer train --data digits --model cnn --method rigl --density 0.1 --out trained
    """

    data: str = "digits"
    """digits, fashion-mnist:FOLDER, images:FOLDER, testbed:text, or a text file or folder"""
    model: str = "cnn"
    """cnn or mlp for images; llama (small, untrained), testbed:lm or a Hugging Face folder for text"""
    scratch: bool = False
    """train a language model's architecture from random weights"""
    width: int = 0
    """of the small networks: first channels of the CNN (8), hidden units of the MLP (256), width of
    the Llama (64)"""
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
        variants = self._variants()
        if self.seeds > 1 and not self._sweeps:
            raise UsageError("--seeds belongs to a comparison: give --sweep-methods too")
        problem = read_problem(
            **self._given("data", "model", "scratch", "width", "batch", "length", "seed")
        )
        how = self._given("optimizer", "lr", "weight_decay", "schedule", "warmup", "clip")
        options = options_for(problem, self.steps, **how)
        run = Training(
            problem, options, self.include, self.exclude, self.save_every, self.log, progress=True
        )
        if self._sweeps:
            self._compare(run, variants)
        else:
            self._single(run, variants[0], problem)
        shutil.rmtree(self._hidden, ignore_errors=True)

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

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

    def _variants(self) -> list[Variant]:
        """The methods to train, at each density."""
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
        variants: list[Variant] = []
        for name in names:
            free = name != "dense" and "density" in _fields(_method_parts(name)[0])
            for value in (densities or [density]) if free or not densities else [None]:
                variants.append(Variant(name, self._method(name, value)))
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

    def _single(self, run: Training, one: Variant, problem: Problem) -> None:
        model, facts = run.measure(one, self.seed, self._hidden)
        report = TrainingReport(model, facts, getattr(problem, "tokenizer", None))
        result = report.save(self.out, overwrite=self.overwrite, labels=self._labels())
        if self.json:
            print_json(result)
            return
        title = f"{one.label} on {self.data}, {self.steps} steps"
        print_table(title, ("", "value"), headline(result))
        note(f"wrote {self.out}: model, result.json, report.html")

    def _compare(self, run: Training, variants: list[Variant]) -> None:
        seeds = [self.seed + k for k in range(self.seeds)]
        report = TrainingComparison(run.compare(variants, seeds, self._hidden))
        result = report.save(self.out, overwrite=self.overwrite, labels=self._labels())
        if self.json:
            print_json(result)
            return
        print_table(f"{result['metric']} ({result['better']} is better) at equal training FLOPs",
                    SWEEP_HEADER, sweep_rows(result))  # fmt: skip
        note(f"wrote {self.out}: result.json, report.html")

    def _labels(self) -> dict[str, str]:
        command = "gossamer " + " ".join(shlex.quote(word) for word in sys.argv[1:])
        return {"data": self.data, "model": self.model, "out": self.out, "command": command}


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
