"""Iterative magnitude pruning with rewinding: lottery tickets.

Trains, prunes the smallest weights, rewinds the rest to an early step and trains again, in rounds.

**Paper.** Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020.
https://arxiv.org/abs/1912.05671

**Claim.** Subnetworks found by iterative magnitude pruning and rewound to an early step train to
the dense accuracy; the same subnetworks drawn anew or at random do not.

**Defaults.** 5 rounds of equal relative pruning, one ranking over all layers, rewinding to the
initial weights.

**Notes.** Each round keeps density^(1/rounds) of what the one before kept. Every parameter and
buffer of the model is rewound, biases and norms included. Optimizer state starts anew at the
rewinding step, in the dense round too. Each layer keeps at least one weight. The cost is rounds + 1
trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.select import check_density
from gossamer.methods.weights.fixed_masks import FixedMasks
from gossamer.methods.weights.gmp import prune_globally
from gossamer.methods.weights.topology import check_whole


@dataclass(frozen=True)
class IMP:
    """Train, prune, rewind the rest to an early step, and train again.

    Each round removes the same share of what is left, by magnitude over all layers.

    Parameters
    ----------
    density : float
        The fraction kept at the end, in (0, 1].
    rounds : int
        How many times it prunes.
    rewind : int
        The step to whose weights the survivors go back.
    """

    density: float
    rounds: int = 5
    rewind: int = 0

    members: ClassVar[int] = 1
    card: ClassVar[Card] = Card(
        name="imp",
        topic="weights",
        role="recipe",
        needs=(),
        patterns=("unstructured",),
        year=2020,
        link="https://arxiv.org/abs/1912.05671",
        status="stable",
    )

    def __post_init__(self) -> None:
        check_density(self.density)
        check_whole(self.rounds, "IMP: rounds")
        if isinstance(self.rewind, bool) or not isinstance(self.rewind, int) or self.rewind < 0:
            raise UsageError(f"rewind is a step of the dense training, not {self.rewind!r}")

    def prune(
        self, layers: Sequence[LayerInfo], masks: Mapping[str, Tensor], index: int
    ) -> dict[str, Tensor]:
        """The support of round `index`, from 1."""
        return prune_globally(layers, masks, self.density ** (index / self.rounds))

    def keep_masks(self, masks: Mapping[str, Tensor]) -> FixedMasks:
        """Training under these masks."""
        return FixedMasks(masks)
