"""How a model of transformers rotates positions into its queries and keys."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

_FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds whose frequencies do not change with the length of the text."""


def rotation_of(model: nn.Module, layer: nn.Module) -> Tensor | None:
    """Radians a position of each pair of entries; None where there is no one rotation in halves."""
    half = getattr(sys.modules.get(type(layer).__module__), "rotate_half", None)
    if half is None:
        return None
    trial = torch.arange(1.0, 5.0)
    if not torch.equal(half(trial), torch.tensor([-3.0, -4.0, 1.0, 2.0])):
        return None  # neighbours are rotated, not halves
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1 or getattr(found[0], "rope_type", "default") not in _FIXED:
        return None
    frequencies: Tensor = found[0].inv_freq  # type: ignore[assignment]
    return frequencies
