"""What is written down of a compression: its figures as plain data."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gossamer.core.result import CompressResult, LayerRecord, PruneResult
from gossamer.engine.data import Batch, call
from gossamer.engine.flops import forward_flops
from gossamer.engine.measure.tasks import Task
from gossamer.nn.kernel_choice.machine import machine as this_machine
from gossamer.ops import _dispatch


def record(
    pruned: PruneResult,
    packed: CompressResult,
    task: Task,
    quality: Mapping[str, float],
    work: Mapping[str, float],
    dtype: torch.dtype,
    bits: int | None,
) -> dict[str, Any]:
    """Everything but the speed, the sweep and the options; `work` from `work_of`."""
    ours = layers_of(pruned, packed)
    name = str(dtype).removeprefix("torch.")
    weights = {id(p): p.numel() for p in task.subject.model.parameters()}
    return {
        "method": pruned.method,
        "pattern": pruned.pattern,
        "bits": bits,
        "requested_density": pruned.requested_density,
        "measured_density": pruned.measured_density,
        "coverage": {
            "pruned": dataclasses.asdict(pruned.coverage),
            "packed": dataclasses.asdict(packed.coverage),
        },
        "layers": [dataclasses.asdict(layer) for layer in packed.layers],
        "figures": {name: dict(told) for name, told in pruned.figures.items()},
        "quality": {"metric": task.metric, "better": task.better, "text_bytes": len(task.text),
                    **quality},
        "bytes": {
            "dense": sum(layer.dense_bytes for layer in ours),
            "sparse": sum(layer.sparse_bytes for layer in ours),
            "model_dense": sum(weights.values()) * dtype.itemsize,
            "what": f"weights of the pruned layers, dense in {name}, kept ones in "
            + (name if bits is None else f"integers of {bits} bits"),
        },
        **flops(pruned, packed, work),
        "machine": machine(packed),
    }  # fmt: skip


def flops(
    pruned: PruneResult, packed: CompressResult, work: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """FLOPs per token: of the whole model as it runs here, and of the pruned layers.

    A layer that runs dense, or whose integers are held dense, multiplies its zeros too.
    """
    share = {x.name: x.density for x in packed.layers if x.kernel and "dense" not in x.kernel}
    chosen = {layer.name for layer in pruned.layers}

    def count(names: Mapping[str, float] | set[str]) -> dict[str, float]:
        mine = {name: work.get(name, 0.0) for name in names}
        run = sum(times * share.get(name, 1.0) for name, times in mine.items())
        return {"dense": 2 * sum(mine.values()), "sparse": 2 * run}

    return {
        "flops": {**count(work), "what": "per token, whole model as it runs here"},
        "flops_pruned": {**count(chosen), "what": "per token, pruned layers as they run here"},
    }


def work_of(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Multiply-adds of one token by the name of the layer, measured on a batch."""
    ids = batch["input_ids"] if not isinstance(batch, torch.Tensor) else batch
    found = forward_flops(model, lambda: call(model, batch))
    return {
        name: found.pop(id(module.weight)) / ids.numel()
        for name, module in model.named_modules()
        if id(getattr(module, "weight", None)) in found and not isinstance(module, nn.Embedding)
    }


def layers_of(pruned: PruneResult, packed: CompressResult) -> list[LayerRecord]:
    """The packed records of the pruned layers."""
    chosen = {layer.name for layer in pruned.layers}
    return [layer for layer in packed.layers if layer.name in chosen]


def machine(packed: CompressResult) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        **this_machine(),
        "isa": packed.isa,
        "kernels": _dispatch.describe(),
        "threads": packed.threads,
        "python": platform.python_version(),
    }
