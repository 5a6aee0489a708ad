"""A recipe's trainings, which can be killed at any step and continued bit for bit.

Beside what `train_rounds` keeps lies a file of figures: the losses and FLOPs of the trainings that
are over, whose own checkpoints are gone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from gossamer.core.errors import FormatError
from gossamer.core.files import write_whole
from gossamer.engine.data import check_same_run
from gossamer.engine.protocols import Recipe, TopologyMethod
from gossamer.engine.train.fit import Fit, TrainingOptions
from gossamer.engine.train.rounds import RoundPart, RoundsResult, parts_of, train_rounds

MEMBER = 10_007
"""Between the seeds of the batches of a soup's copies."""


@dataclass(frozen=True)
class Place:
    """Where a training stands among all of a recipe's.

    steps, flops: what the trainings before it took, such that `steps` + the training's own number
    counts on.
    """

    part: RoundPart
    label: str
    steps: int
    flops: float


Report: TypeAlias = Callable[[Fit, Place], None]
"""Called after each step."""


class FitRounds:
    """A model in training by a recipe, in place.

    `loss(model, step, order)` is the loss of the batch of that step, from 0; `order` seeds which
    batch that is. Copies of a soup have orders of their own. data: inputs on which batch norms take
    new statistics after averaging.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Recipe,
        loss: Callable[[nn.Module, int, int], Tensor],
        recipe: TrainingOptions,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        data: Sequence[Any] | None = None,
    ) -> None:
        self.model, self.method, self.loss, self.recipe = model, method, loss, recipe
        self.include, self.exclude, self.seed, self.data = include, exclude, seed, data
        self.total = sum(part.steps(recipe.steps) for part in parts_of(method))
        self.figures: dict[str, Any] = {}
        """By training: its losses and FLOPs spent; those of a dense step in each."""

    @property
    def losses(self) -> list[float]:
        """Of all trainings that are over, one after another."""
        return list(itertools.chain.from_iterable(x["losses"] for x in self.figures.values()))

    @property
    def spent(self) -> float:
        """FLOPs of all trainings that are over."""
        return float(sum(x["spent"] for x in self.figures.values()))

    @property
    def dense_step(self) -> float:
        """FLOPs of a step of the dense model."""
        return float(next(iter(self.figures.values()))["dense step"])

    def train(
        self,
        folder: Path | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        save_every: int = 50,
        report: Report = lambda fit, place: None,
    ) -> RoundsResult:
        """Train all rounds, from where the folder stands; raises as `Fit.train` does."""
        known = dict(fingerprint or {})
        self._open(folder, known)

        def part(model: nn.Module, method: TopologyMethod, part: RoundPart) -> None:
            self._part(model, method, part, known, save_every, report)
            self._write(folder, known)

        return train_rounds(
            self.model, self.method, part, include=self.include, exclude=self.exclude,
            data=self.data, checkpoint=folder,
        )  # fmt: skip

    def _part(
        self,
        model: nn.Module,
        method: TopologyMethod,
        part: RoundPart,
        fingerprint: dict[str, Any],
        save_every: int,
        report: Report,
    ) -> None:
        key = f"{part.index}-{part.member}-{part.first}"
        self.figures.pop(key, None)  # finished, but the loop was killed before it said so
        order = self.seed + MEMBER * part.member
        fit = Fit(
            model, method, lambda model, step: self.loss(model, step, order), self.recipe,
            include=self.include, exclude=self.exclude, seed=self.seed, first=part.first,
            last=part.last,
        )  # fmt: skip
        copy = f", copy {part.member + 1} of {self.method.members}" * (self.method.members > 1)
        label = f"round {part.index} of {self.method.rounds}{copy * bool(part.index)}"
        place = Place(part, label, len(self.losses) - part.first, self.spent)
        facts = {**fingerprint, "training": key}
        fit.train(part.checkpoint, facts, save_every, lambda fit: report(fit, place))
        self.figures[key] = {
            "losses": fit.losses, "spent": fit.meter.spent, "dense step": fit.meter.dense_step,
        }  # fmt: skip

    def _open(self, folder: Path | None, fingerprint: dict[str, Any]) -> None:
        """Read the figures; begin them where there are none. Refuses those of another recipe."""
        if folder is None or not _file(folder).exists():
            self._write(folder, fingerprint)
            return
        try:
            state = json.loads(_file(folder).read_text())
            old, self.figures = dict(state["fingerprint"]), state["trainings"]
        except (KeyError, TypeError, ValueError):
            raise FormatError(
                f"{_file(folder)}: damaged; delete its folder and start again"
            ) from None
        new = json.loads(json.dumps(fingerprint, default=str))
        remedy = "repeat that run, delete the folder, or choose another"
        check_same_run(str(folder), old, new, remedy)

    def _write(self, folder: Path | None, fingerprint: dict[str, Any]) -> None:
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"fingerprint": fingerprint, "trainings": self.figures}, default=str)
        write_whole(_file(folder), lambda path: path.write_text(text))


def _file(folder: Path) -> Path:
    return folder / "figures.json"
