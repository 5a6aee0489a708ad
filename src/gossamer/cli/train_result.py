"""What a training run tells while it goes on, and at its end."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gossamer.cli.train_tasks import Work
from gossamer.core.pattern import format_pattern
from gossamer.engine.train.fit import Fit


def log_step(writer: Any, fit: Fit, prefix: str, step: int = 0, flops: float = 0.0) -> None:
    """Write one step to TensorBoard; step, flops: what trainings before this one took."""
    values = {"loss": fit.losses[-1], "density": fit.density, "flops": flops + fit.meter.spent}
    values["lr"] = fit.optimizer.param_groups[0]["lr"]
    if fit.run is not None:
        values.update(itop_rate=fit.run.itop_rate, sad=fit.meter.sad_per_update)
    for key, value in values.items():
        writer.add_scalar(prefix + key, value, step + fit.step)


def record(fit: Fit, work: Work, name: str, density: float | None, seed: int) -> dict[str, Any]:
    """What came out of one run."""
    meter, run, steps = fit.meter, fit.run, fit.recipe.steps
    masks = {} if run is None else run.masks
    tail = fit.losses[-max(1, steps // 10) :]
    return {
        "method": name, "pattern": "" if run is None else format_pattern(run.method.pattern),
        "requested_density": density, "measured_density": fit.density,
        "steps": steps, "seed": seed, "recipe": dataclasses.asdict(fit.recipe),
        "quality": quality(work, fit.model),
        "loss": {"first": fit.losses[0], "last": statistics.fmean(tail)},
        "topology": {
            "start_density": meter.start_density, "updates": meter.updates,
            "sad_per_update": meter.sad_per_update, "sad_start_to_end": meter.sad_start_to_end,
            "itop_rate": 1.0 if run is None else run.itop_rate,
        },
        "flops": {"spent": meter.spent, "dense": meter.dense_step * steps,
                  "ratio": meter.spent / (meter.dense_step * steps)},
        "queries": None if fit.estimates is None else fit.estimates.queries,
        "layers": layers_of(masks),
    }  # fmt: skip


def quality(work: Work, model: nn.Module) -> dict[str, Any]:
    """The task's quality of the model, with what it is called."""
    return {"metric": work.metric, "better": work.better, "value": work.quality(model)}


def layers_of(masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Name, shape and density of each layer."""
    return [
        {"name": n, "shape": list(m.shape), "density": float(m.double().mean())}
        for n, m in masks.items()
    ]
