"""Multiply-adds of a model's layers, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.matrix import is_prunable
from gossamer.engine.hooks import evaluating, observe_inputs


def forward_flops(model: nn.Module, forward: Callable[[], object]) -> dict[int, float]:
    """Multiply-adds of one batch by the id of the weight, over Linear, Conv1D and Conv2d layers."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if is_prunable(module) and not isinstance(module, nn.Embedding)
    }
    work: dict[int, float] = {}

    def count(name: str, x: Tensor) -> None:
        module: Any = layers[name]
        places = float(x.numel() // x.shape[-1])
        if isinstance(module, nn.Conv2d):
            places = float(_conv_places(module, x))
        key = id(module.weight)
        work[key] = work.get(key, 0.0) + places * module.weight.numel()

    with evaluating(model), observe_inputs(layers, count):
        forward()
    return work


def _conv_places(module: nn.Conv2d, x: Tensor) -> int:
    """Output positions of the whole batch."""
    sample = torch.empty((1, *x.shape[1:]), device="meta")
    weight = torch.empty_like(module.weight, device="meta")
    padding: Any = module.padding
    out = nn.functional.conv2d(
        sample, weight, None, module.stride, padding, module.dilation, module.groups
    )
    return x.shape[0] * out.shape[-1] * out.shape[-2]
