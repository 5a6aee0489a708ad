"""Magnitude pruning: the smallest weights go.

Removes the weights of smallest absolute value; needs no data.

**Paper.** Learning both Weights and Connections for Efficient Neural Networks, 2015.
https://arxiv.org/abs/1506.02626

**Claim.** With retraining, AlexNet keeps its accuracy with a ninth of its weights.

**Defaults.** Ranked within each layer; uniform allocation.

**Notes.** The published figures need retraining after pruning; one-shot results on language models
are far worse than those of methods that look at the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.pattern import Pattern, Unstructured
from gossamer.core.stats import LayerStats


@dataclass(frozen=True)
class Magnitude:
    """|w|. Units of several weights score the sum, which is their 1-norm.

    References
    ----------
    Learning both Weights and Connections for Efficient Neural Networks (2015).
    """

    card: ClassVar[Card] = Card(
        name="magnitude",
        topic="weights",
        role="scorer",
        needs=(),
        patterns=("unstructured", "nm", "block", "channel"),
        year=2015,
        link="https://arxiv.org/abs/1506.02626",
        status="stable",
    )

    @property
    def default_pattern(self) -> Pattern:
        """Any weight, ranked over the tensor."""
        return Unstructured()

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """|weight|, shape (out, in); statistics are not used."""
        return weight.abs()
