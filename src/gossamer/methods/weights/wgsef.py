"""WGSEF: the weighted group sparse envelope and its exact proximal step.

Pulls all but k groups of channels to zero, so that they can be cut out. What pulls is the exact
proximal step of the convex envelope of 'at most k groups'.

**Paper.** Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization,
2022. https://arxiv.org/abs/2212.12921

**Claim.** A sparsity set in advance is there at convergence, with negligible loss of accuracy.

**Defaults.** Strength 0.1, times the learning rate, at every step until 75% of the run; one budget
in each set of coupled channels; every group costs 1.

**Notes.** The envelope is the least half sum of |w_j|^2 / u_j over 0 <= u_j <= 1 whose costs are
within k. With s the strength times the learning rate, the step scales group j by u_j / (u_j + s).
One step zeroes a group only where the gap between groups is large enough for s, so zeros come with
the steps. Survivors shrink by 1 / (1 + s), as weight decay does. The step is the one of plain SGD:
with adaptive optimizers it is not the exact step. Biases and norms are left alone;
gs.remove_channels folds them. What is cut at `until` is exactly the budget. Of weighted groups
those with the largest norm / sqrt(cost) stay, as long as they fit the budget. That is the order in
which the envelope fills it. At least one stays in each set. The paper's placing of the costs is not
confirmed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.coupling import Coupled
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Channel, Pattern
from gossamer.core.select import kept_count
from gossamer.core.step import Step
from gossamer.methods.weights.groups import (
    check_structured,
    choose,
    members,
    row_masks,
)
from gossamer.methods.weights.topology import StaticSupport, check_fraction, every_weight


@dataclass(frozen=True)
class WGSEF(StaticSupport):
    """Pull all but the largest groups of channels to zero by an exact proximal step.

    A group is a channel of `coupled`: the rows that write it, in all its layers. The step is that
    of the convex envelope of "at most k groups". At its end only the largest groups are kept.

    Parameters
    ----------
    density : float
        The fraction kept at the end, in (0, 1].
    coupled : tuple of Coupled
        The channels that go together, from `gs.coupled_channels(model, batch)`.
    strength : float
        Of the proximal step after each step: the paper's lambda, which the learning rate
        multiplies. Layers that share a budget need one learning rate.
    until : float
        When the largest groups are kept and the rest zeroed, as a fraction of the run.
    pooled : bool
        One budget over all sets rather than one in each.
    weighted : bool
        Groups cost what they hold in weights rather than one each.
    """

    density: float
    coupled: tuple[Coupled, ...]
    strength: float = 0.1
    until: float = 0.75
    pooled: bool = False
    weighted: bool = False

    card: ClassVar[Card] = Card(
        name="wgsef",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("channel",),
        year=2022,
        link="https://arxiv.org/abs/2212.12921",
        status="stable",
    )

    def __post_init__(self) -> None:
        check_structured(self.density, self.coupled)
        check_fraction(self.until, "until")
        if not self.strength > 0:
            raise UsageError("WGSEF needs a strength above 0")

    @property
    def pattern(self) -> Pattern:
        """Whole rows."""
        return Channel(0)

    def start(self, step: Step) -> dict[str, Tensor]:
        """Every weight; the sets and their learning rates are checked now."""
        self.amounts(step, members(self.coupled, "layers", step.layers))
        return every_weight(step.layers)

    def due(self, step: int, total: int) -> bool:
        """At the last step of the stage."""
        return step == self.last(total)

    def edit_weights(self, step: Step) -> dict[str, Tensor]:
        """The weights after the proximal step; none once the stage is over."""
        if step.number > self.last(step.total):
            return {}
        weight = {x.name: x.weight for x in step.layers}
        sets = members(self.coupled, "layers", step.layers)
        amounts = self.amounts(step, sets)
        norms = [group_norms(names, weight) for names in sets]
        costs = self.costs(sets, weight, norms)
        if self.pooled:
            joined = torch.cat(costs)
            scale = envelope_scale(torch.cat(norms), joined, self.budget(joined), amounts[0])
            scales = list(scale.split([len(n) for n in norms]))
        else:
            scales = [
                envelope_scale(n, d, self.budget(d), amount)
                for n, d, amount in zip(norms, costs, amounts, strict=True)
            ]
        return {
            name: weight[name] * scale.unsqueeze(1).to(weight[name].dtype)
            for names, scale in zip(sets, scales, strict=True)
            for name in names
        }

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The groups with the largest norm, or with costs the largest that fit, for good."""
        weight = {x.name: x.weight for x in step.layers}
        sets = members(self.coupled, "layers", step.layers)
        norms = [group_norms(names, weight) for names in sets]
        if not self.weighted:
            return [row_masks(step.layers, sets, choose(norms, self.density, self.pooled))]
        costs = self.costs(sets, weight, norms)
        ranks = [n / d.sqrt() for n, d in zip(norms, costs, strict=True)]
        if self.pooled:
            kept = within_cost(ranks, costs, self.budget(torch.cat(costs)))
        else:
            kept = [
                within_cost([rank], [cost], self.budget(cost))[0]
                for rank, cost in zip(ranks, costs, strict=True)
            ]
        return [row_masks(step.layers, sets, kept)]

    def amounts(self, step: Step, sets: Sequence[Sequence[str]]) -> list[float]:
        """The learning rate times the strength, by set. Raises UsageError where rates differ."""
        shared = [[n for names in sets for n in names]] * len(sets) if self.pooled else sets
        for names in shared:
            for name in names:
                if step.rates[name] != step.rates[names[0]]:
                    raise UsageError(
                        f"{name}: its learning rate {step.rates[name]:g} is not that of {names[0]} "
                        f"({step.rates[names[0]]:g}), whose channels share a budget with it; give "
                        "them one, or use pooled=False"
                    )
        return [self.strength * step.rates[names[0]] for names in shared]

    def costs(
        self, sets: Sequence[Sequence[str]], weight: Mapping[str, Tensor], norms: Sequence[Tensor]
    ) -> list[Tensor]:
        """What each group counts against the budget, float64 (width,) by set."""
        held = [sum(weight[name].shape[1] for name in names) for names in sets]
        return [
            torch.full_like(n, cost if self.weighted else 1)
            for n, cost in zip(norms, held, strict=True)
        ]

    def budget(self, costs: Tensor) -> float:
        """k: the share of the groups, or of their cost, that may stay."""
        if self.weighted:
            return self.density * float(costs.sum())
        return float(max(1, kept_count(len(costs), self.density)))

    def last(self, total: int) -> int:
        """The last step of the stage."""
        return max(1, math.floor(self.until * total))


def group_norms(names: Sequence[str], weight: Mapping[str, Tensor]) -> Tensor:
    """The 2-norm of each channel over all layers that write it, float64 (width,)."""
    squares = [weight[name].double().square().sum(1) for name in names]
    return torch.stack(squares).sum(0).sqrt()


def within_cost(ranks: Sequence[Tensor], costs: Sequence[Tensor], budget: float) -> list[Tensor]:
    """The groups of the highest rank whose costs together fit the budget; one of each set stays."""
    rank, cost = torch.cat([r.clone() for r in ranks]), torch.cat(list(costs))
    sizes = [len(r) for r in ranks]
    for part in rank.split(sizes):
        part[part.argmax()] = torch.inf
    order = rank.argsort(descending=True, stable=True)
    # A hair more, so that 0.1 of 30 holds 3 whichever way it was rounded.
    fits = cost[order].cumsum(0) <= budget * (1 + 1e-9)
    fits[: len(sizes)] = True
    mask = torch.zeros_like(rank, dtype=torch.bool)
    mask[order[fits]] = True
    return list(mask.split(sizes))


def envelope_scale(norms: Tensor, costs: Tensor, budget: float, strength: float) -> Tensor:
    """The factor of each group in argmin_v strength * R(v) + |v - t|^2 / 2, t of these norms.

    R is the envelope (see the card): u_j(eta) = clip(eta n_j / sqrt(d_j) - strength, 0, 1) with eta
    such that the costs of u meet the budget, and the factor is u / (u + strength). All float64
    (groups,). eta is found among the sorted breakpoints, where the cost is piecewise linear:
    O(m log m). With a strength of 0, as where the learning rate is 0, nothing moves.
    """
    if strength == 0:
        return torch.ones_like(norms)
    held = norms > 0
    if float(costs[held].sum()) <= budget:
        return held.to(norms.dtype) / (1.0 + strength)
    rate = norms / costs.sqrt()
    starts = strength / rate[held]
    ends = (1.0 + strength) / rate[held]
    points = torch.cat([starts, ends])
    order = points.argsort()
    slopes = (costs[held] * rate[held]).repeat(2)
    slopes[len(starts) :] *= -1
    points, slope = points[order], slopes[order].cumsum(0)
    cost = torch.cat([costs.new_zeros(1), (slope[:-1] * points.diff()).cumsum(0)])
    # The first point that meets the budget, but for rounding; the piece before it rises.
    at = max(1, int(torch.searchsorted(cost, budget * (1 - 1e-12))))
    eta = points[at - 1] + (budget - cost[at - 1]) / slope[at - 1]
    u = (eta * rate - strength).clamp(0.0, 1.0)
    return u / (u + strength)
