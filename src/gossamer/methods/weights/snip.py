"""SNIP: connection sensitivity before training.

Before training, ranks every weight of the model by |w dL/dw| on one batch.

**Paper.** SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019.
https://arxiv.org/abs/1810.02340

**Claim.** One batch at initialisation finds a mask that trains to nearly the dense accuracy.

**Defaults.** One batch, one global ranking, no floor per layer.

**Notes.** Buffers, gradients and random state are as before the ranking. A layer that the ranking
would empty is an error rather than a network that cannot learn. Weights keep their initialisation,
which the released code of Random Pruning draws anew before it scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.pattern import Unstructured
from gossamer.core.step import Step
from gossamer.methods.weights.topology import StaticSupport
from gossamer.ops.select import select_global


@dataclass(frozen=True)
class SNIP(StaticSupport):
    """Keep the largest |w dL/dw| of one batch over all layers together, then train under it.

    Parameters
    ----------
    density : float
        The fraction kept, in (0, 1].
    """

    density: float

    card: ClassVar[Card] = Card(
        name="snip",
        topic="weights",
        role="topology",
        needs=("loss",),
        patterns=("unstructured",),
        year=2019,
        link="https://arxiv.org/abs/1810.02340",
        status="stable",
    )

    def start(self, step: Step) -> dict[str, Tensor]:
        """The globally most sensitive weights."""
        scores = {x.name: (x.weight * step.gradients()[x.name]).abs() for x in step.layers}
        supports = select_global(scores, Unstructured("global"), self.density)
        return {name: support.mask for name, support in supports.items()}
