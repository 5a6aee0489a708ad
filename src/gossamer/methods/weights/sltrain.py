"""SLTrain: a low-rank matrix plus a sparse one, trained from the start.

Replaces linear layers by a product of thin matrices plus a sparse matrix at random places, for
pretraining with little memory.

**Paper.** SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining,
2024. https://arxiv.org/abs/2406.02214

**Claim.** Comparable to training at full rank, with up to 73% less memory at 7 billion parameters
when combined with quantisation and per-layer updates.

**Defaults.** 3% of the places are sparse and alpha is 16, as for 130 and 350 million parameters in
the released code. The rank follows from the density.

**Notes.** New layers begin anew and forget the weights they replace, for this is a method of
pretraining; the bias stays. The density counts the thin matrices and the sparse values, not the
sparse indices, which take 8 bytes each. Places never change. The dense weight is rebuilt in the
backward pass, as in the paper. The released code also trains in 8 bits; that is the optimizer's
affair. An alpha of 16 is meant for rank 256. Where the rank is far smaller, choose about a quarter
of it: 16 can diverge at ranks below 20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.stats import LayerStats
from gossamer.nn.low_rank_sparse import LowRankSparseLinear


@dataclass(frozen=True)
class SLTrain:
    """W = (alpha / rank) B A + S with S at random places that stay.

    Parameters
    ----------
    sparse : float
        The fraction of all places that S holds.
    alpha : float
        What the product is scaled by, times the rank.
    """

    sparse: float = 0.03
    alpha: float = 16.0

    card: ClassVar[Card] = Card(
        name="sltrain",
        topic="weights",
        role="replacer",
        needs=(),
        patterns=("unstructured",),
        year=2024,
        link="https://arxiv.org/abs/2406.02214",
        status="experimental",
    )

    def __post_init__(self) -> None:
        if not 0 < self.sparse < 1 or not self.alpha > 0:
            raise UsageError("SLTrain needs sparse between 0 and 1, and alpha above 0")

    def replace(
        self, layer: nn.Linear, stats: LayerStats, density: float, generator: torch.Generator
    ) -> nn.Module:
        """A new layer of the largest rank that the density admits; the old weight is not used."""
        out, inputs = layer.weight.shape
        size = out * inputs
        nonzero = math.floor(self.sparse * size)
        rank = math.floor((density * size - nonzero) / (out + inputs) + 1e-9)
        if rank < 1:
            least = (nonzero + out + inputs) / size
            raise UsageError(
                f"{stats.name}: density {density:g} leaves no rank beside {self.sparse:g} sparse; "
                f"ask for at least {least:.3f}, lower sparse, or exclude this layer"
            )
        bound = 1 / math.sqrt(inputs)
        places = torch.randperm(size, generator=generator)[:nonzero].sort().values
        like = layer.weight.detach()

        def uniform(*shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=generator) * 2 * bound - bound
            return drawn.to(like)

        bias = None if layer.bias is None else layer.bias.detach().clone()
        return LowRankSparseLinear(
            like.new_zeros(out, rank), uniform(rank, inputs), uniform(nonzero),
            places.to(like.device), self.alpha / rank, bias,
        )  # fmt: skip
