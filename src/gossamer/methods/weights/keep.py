"""Training under a support that already exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.weights.topology import Fixed


@dataclass(frozen=True)
class Keep(Fixed):
    """Hold the support that the model has: its non-zero weights, or `masks` by layer name.

    For fine-tuning a pruned model. masks: bool matrices (out, in), where a kept weight may be zero.
    """

    masks: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    card: ClassVar[Card] = Card(
        name="keep",
        kind="trainer",
        title="",
        year=2026,
        link="",
        needs=(),
        patterns=("unstructured",),
        claim="",
        status="stable",
        summary="Trains a sparse model on without changing which weights are zero.",
        defaults="the weights that are not zero.",
        notes="",
    )

    def start(
        self,
        layers: Sequence[LayerInfo],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The given support. Raises UsageError where it is not one of these layers."""
        if self.masks is None:
            return {x.name: x.weight != 0 for x in layers}
        found = {name: mask.shape for name, mask in self.masks.items()}
        wanted = {x.name: x.weight.shape for x in layers}
        if found != wanted:
            odd = sorted(found.keys() ^ wanted.keys()) or [
                n for n in found if found[n] != wanted[n]
            ]
            raise UsageError(
                f"{odd[0]}: the given support and the layers in training differ; pass the same "
                "include and exclude to both"
            )
        return {x.name: self.masks[x.name].to(x.weight.device) for x in layers}
