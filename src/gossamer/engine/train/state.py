"""Tensors of a run by layer and name, as a flat mapping and back; learning rates by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gossamer.engine.train.layers import TrainedLayer


def flat(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by `layer:name`."""
    return {f"{layer}:{name}": x for layer, found in state.items() for name, x in found.items()}


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flat`; no module's name has a colon, as none has in a file."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(":")
        state.setdefault(layer, {})[name] = tensor
    return state


def rates_of(optimizer: torch.optim.Optimizer, layers: Sequence[TrainedLayer]) -> dict[str, float]:
    """The learning rate of each layer's weight."""
    rates = {id(x): float(g["lr"]) for g in optimizer.param_groups for x in g["params"]}
    return {x.name: rates[id(x.weight)] for x in layers if id(x.weight) in rates}
