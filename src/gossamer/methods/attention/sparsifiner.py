"""Sparsifiner: tokens of an image attend what a low-rank guess of the map says they would.

A small predictor compresses keys over tokens and mixes a learned basis into a guess of each map. The
largest entries of each row of the guess are computed, and no others.

**Paper.** Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
Transformers, 2023. https://arxiv.org/abs/2303.13755

**Claim.** 48% to 69% fewer FLOPs of attention within 0.4% of the accuracy on ImageNet. Tests
compare masks, guesses and outputs with the release's.

**Defaults.** A density of 0.25, a rank of a sixth of the tokens, the 8 largest coefficients, a
threshold of 0.02 for the basis, and the release's scale of 1 / sqrt(heads) for coefficients.

**Notes.** Training has two stages. In the first, attention is dense and the predictor learns to
guess a teacher's maps: give forward a list, then call `reconstruction`. In the second, the mask is
used and the network learns with `distillation`. The mask has no gradient, so the second stage
teaches the predictor nothing. The first stage guesses with the signed basis and all coefficients.
From then on the basis is absolute, small entries are 0, and only the largest coefficients count,
not renormalised. The first token attends every token. The paper also prunes tokens, which is left
out here. Chosen pairs go to the executor one by one, so what is not chosen is not computed. The
guess still has tokens by tokens entries; `multiply_adds` counts it with the rest. On a processor,
guessing and ranking take longer than they save at the sizes of usual vision transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count, check_share, with_lists
from gossamer.ops.attention import Layout, attention
from gossamer.ops.select import keep


class Maps(NamedTuple):
    """What the first stage compares, without the first token's row: (batch, heads, tokens - 1, tokens)."""

    guess: Tensor
    dense: Tensor


class Sparsifiner(nn.Module):
    """Self-attention over the pairs that a learned predictor chooses.

    Parameters
    ----------
    width : int
        Of input and output.
    tokens : int
        How many there are, the class token included, which is the first.
    heads : int
        Of the attention; divides `width` into an even number.
    density : float
        The share of keys of each query, rounded up.
    rank : int or None
        Of the guess; a sixth of the tokens where None.
    coefficients : int
        How many of a row's coefficients count after the first stage.
    threshold : float
        Entries of the basis up to it are 0 after the first stage.
    bias : bool
        Of the projection to queries, keys and values.

    References
    ----------
    Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (2023).
    """

    card: ClassVar[Card] = Card(
        name="sparsifiner",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("unstructured",),
        year=2023,
        link="https://arxiv.org/abs/2303.13755",
        status="experimental",
    )

    def __init__(
        self, width: int, tokens: int, heads: int, density: float = 0.25, rank: int | None = None,
        coefficients: int = 8, threshold: float = 0.02, bias: bool = False,
    ) -> None:  # fmt: skip
        rank = max(1, tokens // 6) if rank is None else rank
        given = {"width": width, "tokens": tokens, "heads": heads, "rank": rank}
        for name, value in (given | {"coefficients": coefficients}).items():
            check_count("Sparsifiner", name, value)
        check_share("Sparsifiner", "density", density)
        if width % (2 * heads):
            raise UsageError(
                f"Sparsifiner: a width of {width} does not divide into {heads} heads of even width"
            )
        super().__init__()
        self.width, self.tokens, self.heads = width, tokens, heads
        self.budget = math.ceil(density * tokens - 1e-9)
        self.coefficients, self.threshold = coefficients, threshold
        size = width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.project = nn.Linear(width, width)
        self.predictor = nn.ModuleDict(
            {name: nn.Linear(size, size // 2) for name in ("query", "key")}
        )
        self.compress = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, rank), std=0.02))
        self.basis = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, rank), std=0.02))

    def forward(self, x: Tensor, maps: list[Maps] | None = None) -> Tensor:
        """(batch, tokens, width) to the same.

        maps: a list makes this the first stage: attention is dense, and the guess and the dense map
        are appended.
        """
        if x.dim() != 3 or x.shape[1:] != (self.tokens, self.width):
            raise UsageError(
                f"Sparsifiner takes (batch, {self.tokens}, {self.width}), not {tuple(x.shape)}"
            )
        query, key, value = self.parts(x)
        if maps is None:
            empty = Layout.empty(self.tokens, self.tokens)
            layout = with_lists(empty, self.choose(query, key), 1)
            seen, _ = attention(query, key, value, layout)
        else:
            dense = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
            maps.append(Maps(self.guess(query, key, first=True), dense[:, :, 1:]))
            seen = dense @ value
        projected: Tensor = self.project(seen.transpose(1, 2).flatten(2))
        return projected

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, tokens, width of a head)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def guess(self, query: Tensor, key: Tensor, first: bool = False) -> Tensor:
        """The guessed map without the first token's row, (batch, heads, tokens - 1, tokens).

        first: with the signed basis and all coefficients, as the first stage has it.
        """
        short = self.predictor["key"](key).transpose(-1, -2) @ self.compress
        logits = self.predictor["query"](query)[:, :, 1:] @ short * self.heads**-0.5
        weights = logits.softmax(-1)
        if first:
            return weights @ self.basis.t()
        weights = weights * keep(weights, TopK(self.coefficients))
        return weights @ F.threshold(self.basis.abs(), self.threshold, 0.0).t()

    @torch.no_grad()
    def choose(self, query: Tensor, key: Tensor) -> Tensor:
        """bool (batch, heads, tokens, tokens): the pairs that are computed."""
        chosen = keep(self.guess(query, key), TopK(self.budget))
        return torch.cat([torch.ones_like(chosen[:, :, :1]), chosen], dim=2)

    def multiply_adds(self) -> dict[str, int]:
        """Of one image: `dense` attention without projections, `chosen` pairs and the `guess`.

        The guess multiplies the largest coefficients with the entries of the basis that are not 0,
        taken as evenly spread.
        """
        size, rank, count = self.width // self.heads, self.compress.shape[1], self.tokens
        entries = int((self.basis.abs() > self.threshold).sum())
        share = min(1.0, self.coefficients / rank)
        reduced = 2 * count * size * (size // 2) + 2 * count * (size // 2) * rank
        mixed = math.ceil((count - 1) * entries * share)
        pairs = (count - 1) * min(self.budget, count) + count
        return {
            "dense": 2 * count * count * self.width,
            "chosen": 2 * pairs * self.width,
            "guess": self.heads * (reduced + mixed),
        }


def reconstruction(
    guessed: Sequence[Maps], teacher: Sequence[Maps], weight: float = 0.01
) -> Tensor:
    """The first stage's loss: squared errors of guesses against a teacher's dense maps, summed.

    One entry for each layer. The teacher's maps get no gradient.
    """
    if len(guessed) != len(teacher) or not guessed:
        raise UsageError(f"maps of {len(guessed)} layers, and of {len(teacher)} of the teacher")
    parts = [
        F.mse_loss(own.guess, other.dense.detach(), reduction="sum")
        for own, other in zip(guessed, teacher, strict=True)
    ]
    return weight * torch.stack(parts).sum()


def distillation(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    teacher_tokens: Tensor,
    weights: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """The second stage's loss: cross-entropy, KL to the teacher's logits, squared error of tokens."""
    logs = logits.log_softmax(-1)
    target = teacher_logits.detach().log_softmax(-1)
    closeness = F.kl_div(logs, target, reduction="batchmean", log_target=True)
    tokens_apart = F.mse_loss(tokens, teacher_tokens.detach())
    return F.nll_loss(logs, labels) + weights[0] * closeness + weights[1] * tokens_apart
