"""Frozen results: what was asked, what was measured, and which code serves each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.support import Support


@dataclass(frozen=True)
class LayerRecord:
    """One layer. Bytes count the weight alone; kernel is None where the layer stays dense.

    kernel: what serves up to 8 rows of input, or images, and behind a `+` what a form prepared for
    batches. batches: what serves more than 8 rows, prepared or not; empty where dense. decided:
    what chose, the measured costs with what they predict or a rule. predicted: seconds by kernel,
    `dense` among them, where costs were measured. Of integers, density is that after rounding.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    requested: float
    kernel: str | None = None
    reason: str | None = None
    pattern: str = ""
    dense_bytes: int = 0
    sparse_bytes: int = 0
    batches: str = ""
    decided: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did; `supports` maps a layer's name to its kept positions."""

    model: nn.Module
    supports: Mapping[str, Support]
    layers: tuple[LayerRecord, ...]
    method: str
    pattern: str
    requested_density: float
    measured_density: float
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompressResult:
    """What `compress` did: one record per layer, with its kernel or the reason it stays dense."""

    model: nn.Module
    layers: tuple[LayerRecord, ...]
    isa: str
    threads: int

    def __str__(self) -> str:
        """A line for each layer: what serves it, or why it stays dense, and what decided."""
        lines = [f"{len(self.layers)} layers, {self.isa}, {self.threads} threads"]
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            served = layer.kernel or f"dense: {layer.reason}"
            decided = f" ({layer.decided})" if layer.kernel and layer.decided else ""
            lines.append(f"{layer.name}: {shape}, density {layer.density:.3f}, {served}{decided}")
        return "\n".join(lines)


def unwrap(model: nn.Module | PruneResult | CompressResult) -> nn.Module:
    """The module inside a result, or the module itself."""
    if isinstance(model, (PruneResult, CompressResult)):
        return model.model
    if isinstance(model, nn.Module):
        return model
    raise UsageError(f"expected a torch module or a Gossamer result, not {type(model).__name__}")
