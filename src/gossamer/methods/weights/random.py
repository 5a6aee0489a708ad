"""Random pruning: the null score that every mask claim must beat.

Scores are independent uniform numbers, so every support of the pattern is equally likely.

**Paper.** The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for
Sparse Training, 2022. https://arxiv.org/abs/2202.02643

**Claim.** A randomly pruned wide network, trained sparse, can exceed its dense counterpart; the gap
to dense shrinks as networks grow wider and deeper.

**Defaults.** Seed 0; uniform allocation. The paper trains from scratch after pruning.

**Notes.** The paper samples each weight independently, which misses the budget in small layers;
here the kept count is exact. Without training afterwards this is only a floor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.pattern import Pattern, Unstructured
from gossamer.core.stats import LayerStats


@dataclass(frozen=True)
class Random:
    """Uniform random scores, reproducible per layer from `seed` and the layer's name.

    Counts are exact rather than Bernoulli, so that small layers meet the budget.

    Parameters
    ----------
    seed : int
        Of the scores.

    References
    ----------
    The Unreasonable Effectiveness of Random Pruning (2022).
    """

    seed: int = 0

    card: ClassVar[Card] = Card(
        name="random",
        topic="weights",
        role="scorer",
        needs=(),
        patterns=("unstructured", "nm", "block", "channel"),
        year=2022,
        link="https://arxiv.org/abs/2202.02643",
        status="stable",
    )

    @property
    def default_pattern(self) -> Pattern:
        """Any weight, ranked over the tensor."""
        return Unstructured()

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Random scores of the weight's shape, on its device; seed and layer name fix them."""
        digest = hashlib.sha256(f"{self.seed}:{stats.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        # Drawn on the CPU, so that every device gets the same numbers.
        scores = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        return scores.to(weight.device)
