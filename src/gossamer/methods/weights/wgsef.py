"""WGSEF: the weighted group sparse envelope and its exact proximal step.

Pulls all but k groups of channels to zero by the exact proximal step of the convex envelope of 'at
most k groups', so that they can be cut out.

**Paper.** Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization,
2022. https://arxiv.org/abs/2212.12921

**Claim.** A sparsity set in advance is there at convergence, with negligible loss of accuracy.

**Defaults.** Strength 0.01 at every step, until 75% of the run; one budget in each set of coupled
channels; every group costs 1.

**Notes.** The envelope is min over u of half the sum of |w_j|^2 / u_j, 0 <= u_j <= 1, with the
costs of u within k; the step scales group j by u_j / (u_j + strength). One step zeroes a group only
where the gap between groups is large enough for the strength, so zeros come with the steps;
survivors shrink by 1 / (1 + strength), as weight decay does. The step is the one of plain SGD: with
adaptive optimizers it is not the exact step. Biases and norms are left alone; gs.remove_channels
folds them. What is cut at `until` is exactly the budget.
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
        Of the proximal step after each step: learning rate times lambda.
    until : float
        When the largest groups are kept and the rest zeroed, as a fraction of the run.
    pooled : bool
        One budget over all sets rather than one in each.
    weighted : bool
        Groups cost what they hold in weights rather than one each.
    """

    density: float
    coupled: tuple[Coupled, ...]
    strength: float = 0.01
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
        """Every weight; the sets are checked now."""
        members(self.coupled, "layers", step.layers)
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
        norms = [group_norms(names, weight) for names in sets]
        costs = [
            torch.full_like(n, sum(weight[name].shape[1] for name in names) if self.weighted else 1)
            for n, names in zip(norms, sets, strict=True)
        ]
        if self.pooled:
            joined = envelope_scale(
                torch.cat(norms), torch.cat(costs), self.budget(torch.cat(costs)), self.strength
            )
            scales = list(joined.split([len(n) for n in norms]))
        else:
            scales = [
                envelope_scale(n, d, self.budget(d), self.strength)
                for n, d in zip(norms, costs, strict=True)
            ]
        return {
            name: weight[name] * scale.unsqueeze(1).to(weight[name].dtype)
            for names, scale in zip(sets, scales, strict=True)
            for name in names
        }

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The groups with the largest norm, for good."""
        weight = {x.name: x.weight for x in step.layers}
        sets = members(self.coupled, "layers", step.layers)
        scores = [group_norms(names, weight) for names in sets]
        return [row_masks(step.layers, sets, choose(scores, self.density, self.pooled))]

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


def envelope_scale(norms: Tensor, costs: Tensor, budget: float, strength: float) -> Tensor:
    """The factor of each group in argmin_v strength * R(v) + |v - t|^2 / 2, t of these norms.

    R is the envelope (see the card): u_j(eta) = clip(eta n_j / sqrt(d_j) - strength, 0, 1) with eta
    such that the costs of u meet the budget, and the factor is u / (u + strength). All float64
    (groups,). eta is found among the sorted breakpoints, where the cost is piecewise linear:
    O(m log m).
    """
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
