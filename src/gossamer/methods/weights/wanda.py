"""Wanda: weights times the norm of what they multiply.

A weight matters by its size times the 2-norm of its input over calibration data.

**Paper.** A Simple and Effective Pruning Approach for Large Language Models, 2023.
https://arxiv.org/abs/2306.11695

**Claim.** Without retraining or weight updates, well above magnitude pruning on LLaMA and LLaMA-2,
and competitive with methods that update weights.

**Defaults.** Ranked per output row; N:M within groups of consecutive inputs; 128 calibration
windows.

**Notes.** Blocks and channels are not in the paper; a unit's score is the sum of its weights'
scores. The norm counts an input's constant part like its variation. The claim was not seen on the
bundled model, and was on the MiniLM encoder. The figures are in
benchmarks/results/pruning_quality.json and benchmarks/results/minilm.json. Masks are those of the
released code, but that it rounds the weights removed in a row down, and we to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Pattern, Scope, Unstructured
from gossamer.core.stats import LayerStats


@dataclass(frozen=True)
class Wanda:
    """|W_ij| * ||X_j||_2, compared within each output row by default; no weight is updated.

    Parameters
    ----------
    scope : {"row", "tensor", "column", "global"}
        Over what weights are ranked when no pattern is given. `row` is as published.

    References
    ----------
    A Simple and Effective Pruning Approach for Large Language Models (2023).
    """

    scope: Scope = "row"

    card: ClassVar[Card] = Card(
        name="wanda",
        topic="weights",
        role="scorer",
        needs=("norm",),
        patterns=("unstructured", "nm", "block", "channel"),
        year=2023,
        link="https://arxiv.org/abs/2306.11695",
        status="stable",
    )

    @property
    def default_pattern(self) -> Pattern:
        """Any weight, ranked over `scope`."""
        return Unstructured(self.scope)

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Scores (out, in) in float32 or wider. Raises UsageError without input norms (in,)."""
        if stats.norm is None or stats.norm.shape != weight.shape[1:]:
            raise UsageError(f"{stats.name}: Wanda needs the norms of {weight.shape[1]} inputs")
        wide = weight if weight.dtype.itemsize >= 4 else weight.float()
        return wide.abs() * stats.norm.to(wide.dtype)
