"""Training in one call: a sparse network on a problem with its figures, or several at equal cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.io.atomic import new_folder
from gossamer.io.save import save_inside
from gossamer.report.training import SWEEP_HEADER, headline, render_run, render_sweep, sweep_rows
from gossamer.testbed.base import Problem
from gossamer.training_runs import TrainedBy, Training, options_for, variant


@dataclass(frozen=True)
class TrainingReport:
    """What `measure_training` found, with the model it trained.

    Parameters
    ----------
    model : nn.Module
        The trained network, masked.
    facts : mapping
        Every figure as plain data: quality, loss, density, topology, FLOPs, layers and machine.
    tokenizer : object, optional
        Saved beside the model.
    """

    model: nn.Module
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
            What else is written down, such as `data`, its name in the report.

        Returns
        -------
        dict
            The facts with the labels.

        Raises
        ------
        UsageError
            Where the folder is not empty.
        """
        told = {**self.facts, **(labels or {})}
        with new_folder(Path(folder).resolve(), overwrite) as place:
            facts = {"method": told["method"]}
            save_inside(self.model, place, tokenizer=self.tokenizer, provenance=facts)
            _write(place, told, render_run(told))
        return told

    def __str__(self) -> str:
        """The headline figures as lines of text."""
        title = f"{self.facts['method']} on {self.facts['data']}, {self.facts['steps']} steps"
        return "\n".join([title, *("  ".join(cells) for cells in headline(self.facts))])


@dataclass(frozen=True)
class TrainingComparison:
    """What `compare_training` found.

    Parameters
    ----------
    facts : mapping
        The budget, and every run of every method as plain data.
    """

    facts: Mapping[str, Any]

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        labels: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write result.json and report.html, all of it or nothing.

        Parameters
        ----------
        folder, overwrite, labels
            As in `TrainingReport.save`.

        Returns
        -------
        dict
            The facts with the labels.
        """
        told = {**self.facts, **(labels or {})}
        with new_folder(Path(folder).resolve(), overwrite) as place:
            _write(place, told, render_sweep(told))
        return told

    def __str__(self) -> str:
        """The table as lines of text."""
        return "\n".join("  ".join(cells) for cells in [SWEEP_HEADER, *sweep_rows(self.facts)])


def measure_training(
    problem: Problem,
    method: TrainedBy | str,
    *,
    steps: int = 300,
    optimizer: str | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    schedule: str = "cosine",
    warmup: int = 0,
    clip: float = 0.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    log: str | Path | None = None,
    progress: bool = False,
) -> TrainingReport:
    """Train a sparse network on a problem, and measure what came out and what it cost.

    This is what `gossamer train` runs.

    Parameters
    ----------
    problem : Problem
        An `ImageProblem`, a `TextProblem`, one of `gossamer.testbed`, or any object with their
        functions.
    method : topology method, recipe, gradient source, str or None
        Such as `gs.weights.RigL(density=0.1)`, or the same as text, `"rigl:density=0.1"`. None
        trains a dense network.
    steps : int
        Steps of the optimizer. A recipe takes so many in each of its trainings.
    optimizer : {"sgd", "adamw"}, optional
        SGD has momentum 0.9. By default what suits the problem.
    lr, weight_decay : float, optional
        The peak learning rate, and the decay of matrices and kernels. By default 0.1 and 0.0005
        for SGD, 0.001 and 0.1 for AdamW.
    schedule : {"cosine", "linear", "constant"}
        Of the learning rate over the steps.
    warmup : int
        Steps of linear warm-up.
    clip : float
        The largest norm of the kept weights' gradient; 0 does not clip.
    include, exclude : sequence of str
        As in `prune`.
    seed : int
        Of weights, batches and supports.
    checkpoint : path, optional
        A folder in which the run is kept every `save_every` steps. The same call goes on there
        after a kill, and ends with the same bits.
    save_every : int
        Steps between checkpoints.
    log : path, optional
        A folder for TensorBoard's event files.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    TrainingReport
        The model and its figures. It prints as text and saves as a folder with a page.

    Raises
    ------
    UsageError
        For options that do not fit, and for a checkpoint of another run.
    NonFiniteError
        Where the loss is no number. The last checkpoint stays as it was.
    MissingExtra
        For `log` without TensorBoard.

    Examples
    --------
    >>> import gossamer as gs
    >>> from gossamer.testbed import Digits
    >>> report = gs.measure_training(Digits(), gs.weights.RigL(density=0.1), steps=20)
    >>> round(report.facts["measured_density"], 2)
    0.1
    """
    options = options_for(problem, steps, optimizer, lr, weight_decay, schedule, warmup, clip)
    run = Training(problem, options, include, exclude, save_every, log, progress)
    model, facts = run.measure(variant(method), seed, _path(checkpoint))
    return TrainingReport(model, facts, getattr(problem, "tokenizer", None))


def compare_training(
    problem: Problem,
    methods: Mapping[str, TrainedBy | str],
    *,
    steps: int = 300,
    seeds: int = 1,
    optimizer: str | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    schedule: str = "cosine",
    warmup: int = 0,
    clip: float = 0.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    log: str | Path | None = None,
    progress: bool = False,
) -> TrainingComparison:
    """Train the same network by several methods at equal training FLOPs, from equal seeds.

    Parameters
    ----------
    problem : Problem
        As in `measure_training`.
    methods : mapping of str to method
        By the names that the report gives them. Each is as in `measure_training`.
    steps : int
        Steps of the method whose steps cost most. The others take as many as the same FLOPs buy.
    seeds : int
        Runs of each method, from `seed` upward.
    optimizer, lr, weight_decay, schedule, warmup, clip, include, exclude, seed
        As in `measure_training`.
    checkpoint, save_every, log, progress
        As in `measure_training`. Finished runs are kept too.

    Returns
    -------
    TrainingComparison
        The table of all runs. It prints as text and saves as a folder with a page.

    Raises
    ------
    UsageError, NonFiniteError, MissingExtra
        As in `measure_training`, before anything is trained where that can be known.

    Examples
    --------
    >>> import gossamer as gs
    >>> from gossamer.testbed import Digits
    >>> methods = {"dense": None, "SET": gs.weights.SET(density=0.1)}
    >>> report = gs.compare_training(Digits(), methods, steps=10)
    >>> report.facts["variants"][1]["steps"] > 10
    True
    """
    if seeds < 1 or not methods:
        raise UsageError("a comparison has at least one method and one seed")
    options = options_for(problem, steps, optimizer, lr, weight_decay, schedule, warmup, clip)
    run = Training(problem, options, include, exclude, save_every, log, progress)
    variants = [variant(method, label) for label, method in methods.items()]
    return TrainingComparison(run.compare(variants, range(seed, seed + seeds), _path(checkpoint)))


def _path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)


def _write(place: Path, told: Mapping[str, Any], page: str) -> None:
    (place / "report.html").write_text(page)
    (place / "result.json").write_text(json.dumps(told, indent=1) + "\n")
