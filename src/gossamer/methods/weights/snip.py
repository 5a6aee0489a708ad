"""SNIP: connection sensitivity before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.pattern import Unstructured
from gossamer.core.select import select_global
from gossamer.methods.weights.topology import Fixed
from gossamer.ops.statistics import top_mask


@dataclass(frozen=True)
class SNIP(Fixed):
    """Keep the largest |w dL/dw| of one batch over all layers together, then train under it."""

    density: float

    gradients_at_start: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="snip",
        kind="trainer",
        title="SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        year=2019,
        link="https://arxiv.org/abs/1810.02340",
        needs=("gradients",),
        patterns=("unstructured",),
        claim="One batch at initialisation finds a mask that trains to nearly the dense accuracy.",
        status="stable",
        summary="Before training, ranks every weight of the model by |w dL/dw| on one batch.",
        defaults="one batch, one global ranking, no floor per layer.",
        notes="Buffers, gradients and random state are as before the ranking. A layer that the "
        "ranking would empty is an error rather than a network that cannot learn.",
    )

    def start(
        self,
        layers: Sequence[LayerInfo],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The globally most sensitive weights."""
        scores = {x.name: (x.weight * gradients[x.name]).abs() for x in layers}
        supports = select_global(scores, Unstructured("global"), self.density, top_mask)
        return {name: support.mask for name, support in supports.items()}
