"""Widths: whole neurons and heads go, by the size of all their weights.

Scores each neuron, and each key-value head with the queries that use it, by the scores of all its
weights together, and keeps the best in every layer.

**Paper.** Pruning Filters for Efficient ConvNets, 2016. https://arxiv.org/abs/1608.08710

**Claim.** Filters of the smallest sum of absolute weights can go: VGG-16 needs 34% fewer operations
at its accuracy after retraining.

**Defaults.** By magnitude, neurons and heads.

**Notes.** The paper cuts filters of convolutions; here the units are those of transformers, and a
unit is scored by everything that would go with it, readers included. Each layer keeps the same
number, for the config of a model has one number for all. Widths(Random()) is the baseline, and on
SmolLM2 it kept far more quality than magnitude did: the record below has both. Compare the two on
your model before you cut. Without training afterwards the loss is large.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.stats import LayerStats
from gossamer.core.width import Width
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.ops.select import select


@dataclass(frozen=True)
class Widths:
    """Keeps the units whose weights have the largest sum of scores.

    Parameters
    ----------
    scorer : Scorer
        A method that scores weights without data, such as Magnitude() or Random().
    kinds : tuple of str
        What is cut, of `neurons` and `heads`.
    """

    scorer: Any = field(default_factory=Magnitude)
    kinds: tuple[str, ...] = ("neurons", "heads")

    card: ClassVar[Card] = Card(
        name="widths",
        topic="weights",
        role="planner",
        needs=(),
        patterns=("channel",),
        year=2016,
        link="https://arxiv.org/abs/1608.08710",
        status="experimental",
    )

    def __post_init__(self) -> None:
        card = getattr(self.scorer, "card", None)
        if isinstance(self.scorer, type) or card is None or card.role != "scorer" or card.needs:
            raise UsageError(
                f"Widths takes a scorer without data, such as Magnitude(), not {self.scorer!r}"
            )
        if not self.kinds or not set(self.kinds) <= {"neurons", "heads"}:
            raise UsageError(f"Widths: kinds are neurons, heads or both, not {self.kinds!r}")

    def keep(self, width: Width, count: int) -> Tensor:
        """bool (units,): the `count` units with the largest sums; ties go to the first."""
        sums = []
        for name, weight in width.weights.items():
            scores = self.scorer.score(weight, LayerStats(f"{width.name}:{name}", 0))
            sums.append(scores.double().sum(dim=1).cpu())
        total = torch.stack(sums).sum(dim=0).unsqueeze(0)
        return select(total, Unstructured(), count / width.units, width.name).mask[0]
