"""What a training run tells while it goes on, and at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.core.errors import MissingExtra
from gossamer.core.pattern import format_pattern
from gossamer.engine.train.fit import Fit
from gossamer.engine.train.fit_rounds import FitRounds
from gossamer.engine.train.rounds import RoundsResult


@contextlib.contextmanager
def event_writer(folder: str | Path | None) -> Iterator[Any]:
    """TensorBoard's writer for a folder; None without one. Raises MissingExtra."""
    if not folder:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard") from None
    writer: Any = SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()


def log_step(writer: Any, fit: Fit, prefix: str, step: int = 0, flops: float = 0.0) -> None:
    """Write one step to TensorBoard; step, flops: what trainings before this one took."""
    values = {"loss": fit.losses[-1], "density": fit.density, "flops": flops + fit.meter.spent}
    values["lr"] = fit.optimizer.param_groups[0]["lr"]
    if fit.run is not None:
        values.update(itop_rate=fit.run.itop_rate, sad=fit.meter.sad_per_update)
    for key, value in values.items():
        writer.add_scalar(prefix + key, value, step + fit.step)


def record(fit: Fit) -> dict[str, Any]:
    """What came out of one run, but for its quality."""
    meter, run, steps = fit.meter, fit.run, fit.recipe.steps
    masks = {} if run is None else run.masks
    return {
        "pattern": "" if run is None else format_pattern(run.method.pattern),
        "measured_density": fit.density,
        "steps": steps,
        "recipe": dataclasses.asdict(fit.recipe),
        "loss": _ends(fit.losses, fit.losses[-max(1, steps // 10) :]),
        "topology": {
            "start_density": meter.start_density, "updates": meter.updates,
            "sad_per_update": meter.sad_per_update, "sad_start_to_end": meter.sad_start_to_end,
            "itop_rate": 1.0 if run is None else run.itop_rate,
        },
        "flops": _flops(meter.spent, meter.dense_step * steps),
        "queries": None if fit.estimates is None else fit.estimates.queries,
        "layers": _layers(masks),
    }  # fmt: skip


def record_rounds(fit: FitRounds, result: RoundsResult) -> dict[str, Any]:
    """What came out of a recipe; FLOPs are of all trainings together, beside one dense training."""
    supports, densities, steps = result.supports, result.densities, fit.recipe.steps
    last = list(fit.figures.values())[-1]["losses"]
    removed = densities[0] - densities[-1]  # each support lies in the one before
    return {
        "pattern": format_pattern(next(iter(supports.values())).pattern),
        "measured_density": densities[-1],
        "steps": steps, "steps_together": len(fit.losses),
        "recipe": dataclasses.asdict(fit.recipe), "densities": list(densities),
        "loss": _ends(fit.losses, last[-max(1, len(last) // 10) :]),
        "topology": {
            "start_density": densities[0], "updates": fit.method.rounds,
            "sad_per_update": removed / fit.method.rounds, "sad_start_to_end": removed,
            "itop_rate": 1.0,
        },
        "flops": _flops(fit.spent, fit.dense_step * steps),
        "layers": _layers({n: x.mask for n, x in supports.items()}),
    }  # fmt: skip


def _ends(losses: list[float], tail: list[float]) -> dict[str, float]:
    return {"first": losses[0], "last": statistics.fmean(tail)}


def _flops(spent: float, dense: float) -> dict[str, float]:
    return {"spent": spent, "dense": dense, "ratio": spent / dense}


def _layers(masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Name, shape and density of each layer."""
    return [
        {"name": n, "shape": list(m.shape), "density": float(m.double().mean())}
        for n, m in masks.items()
    ]
