"""Runs of `gossamer train` that train in rounds: killed at any step, continued bit for bit.

Beside what `gs.train_rounds` keeps lies a file of figures: the losses and costs of the trainings
that are over, whose own checkpoints are gone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.cli.train_result import layers_of, log_step, quality
from gossamer.cli.train_tasks import Images, Text
from gossamer.core.errors import FormatError
from gossamer.core.files import write_whole
from gossamer.core.pattern import format_pattern
from gossamer.engine.data import check_same_run
from gossamer.engine.progress import track
from gossamer.engine.protocols import Recipe, TopologyMethod
from gossamer.engine.train.fit import Fit, TrainingOptions
from gossamer.engine.train.rounds import RoundPart, RoundsResult, parts_of, train_rounds

MEMBER = 10_007
"""Between the seeds of the batches of a soup's copies."""


@dataclass
class RoundsRun:
    """One run of an outer loop over a task, in a hidden folder."""

    work: Images | Text
    method: Recipe
    recipe: TrainingOptions
    seed: int
    include: list[str]
    exclude: list[str]
    folder: Path
    fingerprint: dict[str, Any]
    save_every: int
    writer: Any
    prefix: str
    _figures: dict[str, Any] = field(default_factory=dict)
    """By training: its losses and FLOPs spent; those of a dense step in each."""

    def train(self, name: str, density: float | None) -> tuple[nn.Module, list[float], Any]:
        """Train all rounds from where they stand; the model, all losses, the record."""
        self._open()
        model = self.work.build(self.seed)
        total = sum(part.steps(self.recipe.steps) for part in parts_of(self.method))
        with track(total, True, f"{name} {self.seed}") as bar:
            for _ in range(sum(len(x["losses"]) for x in self._figures.values())):
                bar("going on")
            result = train_rounds(
                model,
                self.method,
                lambda model, method, part: self._part(model, method, part, bar),
                include=self.include,
                exclude=self.exclude,
                data=self.work.inputs(),
                checkpoint=self.folder,
            )
        losses = list(itertools.chain.from_iterable(x["losses"] for x in self._figures.values()))
        return model, losses, self._record(model, result, losses, name, density)

    def _part(
        self, model: nn.Module, method: TopologyMethod, part: RoundPart, bar: Callable[[str], None]
    ) -> None:
        """One training of the loop; copies of a soup see the batches in orders of their own."""
        key = _key(part)
        self._figures.pop(key, None)  # finished, but the loop was killed before it said so
        order = self.seed + MEMBER * part.member
        fit = Fit(
            model,
            method,
            lambda model, step: self.work.loss(model, step, order),
            self.recipe,
            include=self.include,
            exclude=self.exclude,
            seed=self.seed,
            first=part.first,
            last=part.last,
        )
        before = sum(len(x["losses"]) for x in self._figures.values()) - part.first
        spent = sum(x["spent"] for x in self._figures.values())
        copy = f", copy {part.member + 1} of {self.method.members}" * (self.method.members > 1)
        where = f"round {part.index} of {self.method.rounds}{copy * bool(part.index)}"
        seen = part.first

        def report(fit: Fit) -> None:
            nonlocal seen
            for _ in range(fit.step - seen):
                bar(f"{where}  loss {fit.losses[-1]:.4f}  density {fit.density:.4f}")
            seen = fit.step
            if self.writer is not None:
                log_step(self.writer, fit, self.prefix, before, spent)
                self.writer.add_scalar(f"{self.prefix}round", part.index, before + fit.step)

        fingerprint = {**self.fingerprint, "training": key}
        fit.train(part.checkpoint, fingerprint, self.save_every, report)
        self._figures[key] = {
            "losses": fit.losses, "spent": fit.meter.spent, "dense step": fit.meter.dense_step,
        }  # fmt: skip
        self._write()

    @property
    def _file(self) -> Path:
        return self.folder / "figures.json"

    def _open(self) -> None:
        """Read the figures; begin them where there are none. Refuses those of another recipe."""
        new = json.loads(json.dumps(self.fingerprint, default=str))
        if not self._file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        try:
            state = json.loads(self._file.read_text())
            old, self._figures = dict(state["fingerprint"]), state["trainings"]
        except (KeyError, TypeError, ValueError):
            raise FormatError(f"{self._file}: damaged; delete its folder and start again") from None
        remedy = "repeat that run's command, delete the folder, or choose another --out"
        check_same_run(str(self.folder), old, new, remedy)

    def _write(self) -> None:
        body = {"fingerprint": self.fingerprint, "trainings": self._figures}
        text = json.dumps(body, default=str)
        write_whole(self._file, lambda path: path.write_text(text))

    def _record(
        self, model: nn.Module, result: RoundsResult, losses: list[float], name: str,
        density: float | None,
    ) -> dict[str, Any]:  # fmt: skip
        """What came out; FLOPs are of all trainings together, beside one dense training."""
        supports, densities, steps = result.supports, result.densities, self.recipe.steps
        figures = list(self._figures.values())
        last = figures[-1]["losses"]
        spent = sum(x["spent"] for x in figures)
        dense = figures[0]["dense step"] * steps
        removed = densities[0] - densities[-1]  # each support lies in the one before
        return {
            "method": name,
            "pattern": format_pattern(next(iter(supports.values())).pattern),
            "requested_density": density, "measured_density": densities[-1],
            "steps": steps, "steps_together": len(losses), "seed": self.seed,
            "recipe": dataclasses.asdict(self.recipe), "densities": list(densities),
            "quality": quality(self.work, model),
            "loss": {"first": losses[0],
                     "last": statistics.fmean(last[-max(1, len(last) // 10) :])},
            "topology": {
                "start_density": densities[0], "updates": self.method.rounds,
                "sad_per_update": removed / self.method.rounds, "sad_start_to_end": removed,
                "itop_rate": 1.0,
            },
            "flops": {"spent": spent, "dense": dense, "ratio": spent / dense},
            "layers": layers_of({n: x.mask for n, x in supports.items()}),
        }  # fmt: skip


def _key(part: RoundPart) -> str:
    return f"{part.index}-{part.member}-{part.first}"
