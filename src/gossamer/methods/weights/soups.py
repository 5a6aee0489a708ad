"""Sparse model soups: averages of retrained copies that share one support.

Prunes in phases; in each, several copies retrain under one support and their weights are averaged.

**Paper.** Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging, 2024.
https://arxiv.org/abs/2306.16788

**Claim.** The average of copies retrained from one pruned model beats each of them and plain
iterative pruning, at the inference cost of one.

**Defaults.** 3 phases, 3 copies, uniform averages; the training function makes the copies differ by
`part.member`.

**Notes.** All copies of a phase start from the same pruned weights. So their supports are equal,
which is checked; the released code takes the last one unchecked. It averages statistics of norms
before it takes them anew, and counters too. Here the statistics are taken anew on training data
before the soup is used, and counters are those of the first copy. With `evaluate` the soup is
greedy: copies in order of their score, each taken in if the soup does not get worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.select import check_density
from gossamer.methods.weights.fixed_masks import FixedMasks
from gossamer.methods.weights.gmp import prune_globally
from gossamer.methods.weights.topology import check_whole


@dataclass(frozen=True)
class SparseModelSoups:
    """Prune in phases; in each, retrain several copies and average their weights.

    Each phase removes the same share, by magnitude over all layers. The copies differ in one
    factor.

    Parameters
    ----------
    density : float
        The fraction kept at the end, in (0, 1].
    rounds : int
        How many phases.
    members : int
        How many copies in each.
    """

    density: float
    rounds: int = 3
    members: int = 3

    rewind: ClassVar[None] = None
    card: ClassVar[Card] = Card(
        name="sparsemodelsoups",
        topic="weights",
        role="recipe",
        needs=(),
        patterns=("unstructured",),
        year=2024,
        link="https://arxiv.org/abs/2306.16788",
        status="stable",
    )

    def __post_init__(self) -> None:
        check_density(self.density)
        check_whole(self.rounds, "SparseModelSoups: rounds")
        check_whole(self.members, "SparseModelSoups: members")

    def prune(
        self, layers: Sequence[LayerInfo], masks: Mapping[str, Tensor], index: int
    ) -> dict[str, Tensor]:
        """The support of phase `index`, from 1."""
        return prune_globally(layers, masks, self.density ** (index / self.rounds))

    def keep_masks(self, masks: Mapping[str, Tensor]) -> FixedMasks:
        """Training under these masks."""
        return FixedMasks(masks)
