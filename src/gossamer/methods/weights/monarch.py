"""Monarch: linear layers as two block-diagonal matrices around a permutation.

Replaces a dense matrix by the nearest product of two block-diagonal ones, or by a random one.

**Paper.** Monarch: Expressive Structured Matrices for Efficient and Accurate Training, 2022.
https://arxiv.org/abs/2204.00595

**Claim.** Vision transformers and GPT-2 train twice as fast at similar quality; multiplied out after
a first phase, GPT-2 pretrains twice as fast; fine-tuned BERT is 1.7 times as fast.

**Defaults.** Four blocks, as in the released layer; projected from the given weight.

**Notes.** The projection is the best in the Frobenius norm, slice by slice. The density decides the
rank of the slices; one over the square of the blocks, times the shorter side, is the paper's. Sides
that the blocks do not divide are padded. start='random' draws both factors Kaiming-uniform by the
width of a block, for training from the start. Small block products are slower than one dense product
on most processors: measure before you keep it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.card import Card
from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.stats import LayerStats
from gossamer.nn.monarch import MonarchLinear, monarch_project


@dataclass(frozen=True)
class Monarch:
    """Two block-diagonal factors; the rank of their slices follows from the density.

    Parameters
    ----------
    blocks : int
        Of each factor.
    start : {"project", "random"}
        The nearest to the given weight, or drawn anew.
    """

    blocks: int = 4
    start: Literal["project", "random"] = "project"

    card: ClassVar[Card] = Card(
        name="monarch",
        topic="weights",
        role="replacer",
        needs=(),
        patterns=("block",),
        year=2022,
        link="https://arxiv.org/abs/2204.00595",
        status="experimental",
    )

    def __post_init__(self) -> None:
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise UsageError(f"Monarch needs a whole number of blocks, not {self.blocks!r}")
        if self.start not in ("project", "random"):
            raise UsageError(f"Monarch: start is project or random, not {self.start!r}")

    def replace(
        self, layer: nn.Linear, stats: LayerStats, density: float, generator: torch.Generator
    ) -> nn.Module:
        """The layer whose slices have the largest rank that the density admits."""
        out, inputs = layer.weight.shape
        rows, columns = (-(-side // self.blocks) for side in (out, inputs))
        each = self.blocks * self.blocks * (rows + columns)
        rank = min(math.floor(density * out * inputs / each + 1e-9), rows, columns)
        if rank < 1:
            raise UsageError(
                f"{stats.name}: {self.blocks} blocks need a density of at least "
                f"{each / (out * inputs):.3f}, not {density:g}; ask for more, take more or fewer "
                "blocks, or exclude this layer"
            )
        weight = layer.weight.detach()
        if self.start == "project":
            if not bool(torch.isfinite(weight).all()):
                raise NonFiniteError(f"{stats.name}: its weight holds NaN or inf; repair it first")
            padded = F.pad(weight, (0, columns * self.blocks - inputs, 0, rows * self.blocks - out))
            first, second = monarch_project(padded, self.blocks, self.blocks, rank)
        else:
            first = _uniform((self.blocks, rank * self.blocks, columns), generator).to(weight)
            second = _uniform((self.blocks, rows, rank * self.blocks), generator).to(weight)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return MonarchLinear(inputs, out, first, second, bias)


def _uniform(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(shape[-1])
    return torch.rand(shape, generator=generator) * 2 * bound - bound
