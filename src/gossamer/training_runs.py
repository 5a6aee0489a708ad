"""The runs behind `measure_training` and `compare_training`, which can be killed and continued."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.files import write_whole
from gossamer.engine.progress import Step, track
from gossamer.engine.protocols import GradientSource, Recipe, TopologyMethod
from gossamer.engine.train.fit import Fit, TrainingOptions
from gossamer.engine.train.fit_rounds import FitRounds, Place
from gossamer.engine.train.flops import expected_flops, expected_query_flops, steps_for
from gossamer.engine.train.record import event_writer, log_step, record, record_rounds
from gossamer.engine.train.rounds import expected_rounds_flops
from gossamer.methods import build
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed.base import Problem

TrainedBy: TypeAlias = TopologyMethod | Recipe | GradientSource | None
"""What makes a network sparse while it trains, or estimates its gradients; None: plain training."""

_CURVE = 400
"""Points of the loss curve that are kept, about."""
_USUAL = {"sgd": (0.1, 5e-4), "adamw": (1e-3, 0.1)}
"""Learning rate and weight decay of an optimizer unless others are named."""


def options_for(
    problem: Problem,
    steps: int,
    optimizer: str | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    schedule: str = "cosine",
    warmup: int = 0,
    clip: float = 0.0,
) -> TrainingOptions:
    """How to train, with the usual values of the optimizer that suits the problem."""
    name = optimizer or problem.optimizer
    rate, decay = _USUAL.get(name, _USUAL["sgd"])
    return TrainingOptions(
        steps, rate if lr is None else lr, name, decay if weight_decay is None else weight_decay,
        schedule, warmup, clip,
    )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A method under the name that reports give it."""

    label: str
    method: TrainedBy

    @property
    def density(self) -> float | None:
        """What it was asked for; None for dense training, and methods that are asked otherwise."""
        found: float | None = getattr(self.method, "density", None)
        return found

    def check(self, steps: int) -> None:
        """Raise UsageError for a method that does not train, or not in so few steps."""
        if self.method is None:
            return
        role = self.method.card.role
        if role not in ("topology", "recipe", "gradient_source"):
            raise UsageError(
                f"{self.label} is a {role.replace('_', ' ')}; what trains here is a topology "
                "method, a recipe or a gradient source (see gs.cards())"
            )
        if isinstance(self.method, Recipe) and (self.method.rewind or 0) >= steps:
            raise UsageError(
                f"{self.label} rewinds to step {self.method.rewind}, which is not before the "
                f"{steps} steps"
            )


def variant(method: TrainedBy | str, label: str = "") -> Variant:
    """A method, or its name with options, under a label or its own name."""
    if isinstance(method, str):
        return Variant(label or method, None if method == "dense" else build(method))
    return Variant(label or ("dense" if method is None else method.card.name), method)


@dataclass(frozen=True)
class Training:
    """How a problem is trained, whatever the method."""

    problem: Problem
    options: TrainingOptions
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    save_every: int = 50
    log: str | Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise UsageError(f"save_every is at least 1, not {self.save_every}")

    def measure(
        self, one: Variant, seed: int, checkpoint: Path | None = None
    ) -> tuple[nn.Module, dict[str, Any]]:
        """One run, from its checkpoint or its start to its end, and what came out."""
        one.check(self.options.steps)
        file = None if checkpoint is None else checkpoint / "checkpoint.safetensors"
        with event_writer(self.log) as writer:
            model, losses, facts = self._run(one, seed, self.options, file, writer, "")
        curve = list(enumerate(losses, 1))
        facts["loss"]["curve"] = curve[:: max(1, len(curve) // _CURVE)]
        return model, {**facts, **self._facts()}

    def compare(
        self, variants: Sequence[Variant], seeds: Sequence[int], checkpoint: Path | None = None
    ) -> dict[str, Any]:
        """Every variant from every seed, each for the FLOPs of the costliest one."""
        for one in variants:
            one.check(self.options.steps)
        model = self.problem.build(seeds[0])
        cost = partial(self._cost, model, seeds[0])
        budget = max(cost(one, self.options.steps) for one in variants)
        found: list[dict[str, Any]] = []
        with event_writer(self.log) as writer:
            for one in variants:
                steps = steps_for(budget, self.options.steps, partial(cost, one))
                runs = [self._kept(one, seed, steps, checkpoint, writer) for seed in seeds]
                found.append(
                    {"method": one.label, "density": one.density, "steps": steps, "runs": runs}
                )
        return {
            **self._facts(), "metric": self.problem.metric, "better": self.problem.better,
            "budget_flops": budget, "seeds": list(seeds), "variants": found,
        }  # fmt: skip

    def _cost(self, model: nn.Module, seed: int, one: Variant, steps: int) -> float:
        """FLOPs of a run of so many steps."""

        def loss(model: nn.Module) -> Any:
            return self.problem.loss(model, 0, seed)

        names = {"include": self.include, "exclude": self.exclude}
        if isinstance(one.method, Recipe):
            return expected_rounds_flops(model, one.method, steps, loss, **names)
        if isinstance(one.method, GradientSource):
            return expected_query_flops(model, one.method, steps, loss)
        return expected_flops(model, one.method, steps, loss, **names)

    def _kept(
        self, one: Variant, seed: int, steps: int, folder: Path | None, writer: Any
    ) -> dict[str, Any]:
        """One run of a comparison; read from disk where the same call finished it already."""
        options = dataclasses.replace(self.options, steps=steps)
        prefix = f"{one.label}-{one.density}-{seed}"
        if folder is None:
            return self._run(one, seed, options, None, writer, f"{prefix}/")[2]
        label = re.sub(r"[^\w.,=-]+", "-", prefix)
        same = json.loads(json.dumps(self._fingerprint(one, seed, options), default=str))
        done = folder / f"{label}.json"
        if done.exists():
            kept = json.loads(done.read_text())
            if kept["fingerprint"] == same:
                found: dict[str, Any] = kept["run"]
                return found
        file = folder / f"{label}.safetensors"
        run = self._run(one, seed, options, file, writer, f"{prefix}/")[2]
        body = json.dumps({"fingerprint": same, "run": run})
        write_whole(done, lambda path: path.write_text(body))
        return run

    def _run(
        self, one: Variant, seed: int, options: TrainingOptions, file: Path | None, writer: Any,
        prefix: str,
    ) -> tuple[nn.Module, list[float], dict[str, Any]]:  # fmt: skip
        """The trained model, its losses and its record; a recipe keeps a folder beside `file`."""
        problem, method = self.problem, one.method
        model, known = problem.build(seed), self._fingerprint(one, seed, options)
        names: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "seed": seed}
        if isinstance(method, Recipe):
            rounds = FitRounds(model, method, problem.loss, options, data=problem.inputs(), **names)
            with track(rounds.total, self.progress, f"{one.label} {seed}") as bar:
                folder = None if file is None else file.with_suffix("")
                result = rounds.train(folder, known, self.save_every, _Watch(bar, writer, prefix))
            losses, found = rounds.losses, record_rounds(rounds, result)
        else:
            source = method if isinstance(method, GradientSource) else None
            supports = None if isinstance(method, GradientSource) else method
            fit = Fit(
                model, supports, lambda model, step: problem.loss(model, step, seed), options,
                source=source, **names,
            )  # fmt: skip
            with track(options.steps, self.progress, f"{one.label} {seed}") as bar:
                fit.train(file, known, self.save_every, _Watch(bar, writer, prefix))
            losses, found = fit.losses, record(fit)
        quality = {
            "metric": problem.metric, "better": problem.better, "value": problem.quality(model),
        }  # fmt: skip
        asked = {"method": one.label, "requested_density": one.density, "seed": seed}
        return model, losses, {**asked, **found, "quality": quality}

    def _fingerprint(self, one: Variant, seed: int, options: TrainingOptions) -> dict[str, Any]:
        """What tells this run from others."""
        return {
            **dataclasses.asdict(options), **self.problem.facts(), "problem": self.problem.name,
            "method": repr(one.method), "seed": seed, "include": list(self.include),
            "exclude": list(self.exclude),
        }  # fmt: skip

    def _facts(self) -> dict[str, Any]:
        here = {**machine(), "python": platform.python_version()}
        return {"data": self.problem.name, "machine": here}


class _Watch:
    """Follows a run: a bar, and TensorBoard where there is a writer."""

    def __init__(self, bar: Step, writer: Any, prefix: str) -> None:
        self.bar, self.writer, self.prefix, self.seen = bar, writer, prefix, 0

    def __call__(self, fit: Fit, place: Place | None = None) -> None:
        """Called after each step; the first call counts what a checkpoint held."""
        before, spent = (0, 0.0) if place is None else (place.steps, place.flops)
        where = "" if place is None else f"{place.label}  "
        step = before + fit.step
        self.bar(f"{where}loss {fit.losses[-1]:.4f}  density {fit.density:.4f}", step - self.seen)
        self.seen = step
        if self.writer is not None:
            log_step(self.writer, fit, self.prefix, before, spent)
            if place is not None:
                self.writer.add_scalar(f"{self.prefix}round", place.part.index, step)
