"""SparseGPT: choose weights and repair the others, column by column, with the layer's Hessian.

Removes the weights whose loss is cheapest to repair and updates the weights to their right by the
inverse Hessian of the layer's inputs.

**Paper.** SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023.
https://arxiv.org/abs/2301.00774

**Claim.** Models of 175 billion parameters reach 50 to 60% unstructured sparsity, and 2:4, in hours
on one GPU. The loss in perplexity is small, with no retraining.

**Defaults.** Column blocks of 128, damping 0.01 of the mean diagonal, 128 calibration windows.

**Notes.** Supports are chosen per column block, as published. Counts are rounded cumulatively so
that the layer's total is exact. The released code removes one weight more in each block, for it
also removes what equals the threshold. Blocks of weights are an extension: tiles are scored by the
sum of w^2 / U_jj^2 and chosen per column block. Column channels likewise. Row channels have nothing
to repair and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import NonFiniteError, PatternError, UsageError
from gossamer.core.pattern import (
    NM,
    Block,
    Channel,
    Pattern,
    Unstructured,
    check_pattern,
    format_pattern,
)
from gossamer.core.select import check_density, check_finite, kept_count
from gossamer.core.stats import LayerStats
from gossamer.core.support import Support
from gossamer.ops.statistics import top_mask


@dataclass(frozen=True)
class SparseGPT:
    """Approximate optimal brain surgeon over a layer's columns, left to right.

    It takes O(in^3 + out * in^2) time and O(in^2) memory.

    Parameters
    ----------
    block : int
        Columns whose support is chosen together, and whose errors are carried on lazily.
    damping : float
        Times the mean of the Hessian's diagonal, added to it.

    References
    ----------
    SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (2023).
    """

    block: int = 128
    damping: float = 0.01

    card: ClassVar[Card] = Card(
        name="sparsegpt",
        topic="weights",
        role="solver",
        needs=("hessian",),
        patterns=("unstructured", "nm", "block", "channel"),
        year=2023,
        link="https://arxiv.org/abs/2301.00774",
        status="stable",
    )

    def __post_init__(self) -> None:
        if self.block < 1 or not self.damping > 0:
            raise UsageError("SparseGPT needs block >= 1 and damping > 0")

    @property
    def default_pattern(self) -> Pattern:
        """Any weight, ranked over a column block."""
        return Unstructured()

    def solve(
        self, weight: Tensor, stats: LayerStats, pattern: Pattern, density: float
    ) -> tuple[Tensor, Support]:
        """The repaired weight (out, in), in the weight's dtype, and its support.

        Works in float32, or float64 for a float64 weight. Raises UsageError without a Hessian,
        PatternError for a pattern that does not fit, NonFiniteError naming the layer.
        """
        density = check_density(density)
        _check(pattern, weight, stats, density)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        work = weight.detach().to(dtype, copy=True)
        assert stats.hessian is not None
        dead = stats.hessian.diagonal() == 0
        work[:, dead] = 0
        factor = inverse_factor(stats.hessian, self.damping, stats.name).to(dtype)
        mask = torch.zeros_like(work, dtype=torch.bool)
        unit = _unit_columns(pattern)
        width = unit * max(1, self.block // unit)
        for start in range(0, work.shape[1], width):
            stop = min(start + width, work.shape[1])
            columns = work[:, start:stop]
            square = factor[start:stop, start:stop]
            chosen = _choose(columns, square.diagonal(), pattern, density, start)
            errors = _sweep(columns, square, chosen, pattern)
            mask[:, start:stop] = chosen
            work[:, stop:] -= errors @ factor[start:stop, stop:]
        support = Support(mask, pattern, density)
        return support.apply(work).to(weight.dtype), support


def inverse_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """Upper Cholesky factor U of the damped inverse, U^T U = (H + damp I)^-1, in float64.

    Inputs that were always zero get a unit diagonal. Where the matrix is not positive definite
    in floating point, damping grows tenfold up to three times before UsageError.
    """
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    for _ in range(4):
        damped = hessian + damping * diagonal.mean() * torch.eye(
            len(hessian), dtype=hessian.dtype, device=hessian.device
        )
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(info):
                return upper
        damping *= 10
    raise UsageError(
        f"{name}: its Hessian cannot be inverted even with damping {damping / 10:g}; give more "
        "calibration data"
    )


def _check(pattern: Pattern, weight: Tensor, stats: LayerStats, density: float) -> None:
    name = stats.name
    check_pattern(pattern, weight.shape, name)
    if isinstance(pattern, Channel) and pattern.dim == 0:
        raise PatternError(
            f"{name}: SparseGPT cannot repair a removed row ({format_pattern(pattern)}); use "
            "Wanda or Magnitude, or channel:1"
        )
    if isinstance(pattern, NM) and abs(density - pattern.density) > 1e-9:
        raise PatternError(
            f"{name}: {format_pattern(pattern)} keeps {pattern.density:g} of the weights, which a "
            f"density of {density:g} contradicts"
        )
    if getattr(pattern, "scope", "tensor") == "global":
        raise PatternError(f"{name}: SparseGPT solves one layer at a time; scope global cannot be")
    if stats.hessian is None or stats.hessian.shape != (weight.shape[1],) * 2:
        raise UsageError(f"{name}: SparseGPT needs the Hessian of {weight.shape[1]} inputs")
    check_finite(weight, name)
    if not bool(torch.isfinite(stats.hessian).all()):
        raise NonFiniteError(f"{name}: its Hessian holds NaN or inf; check the calibration data")


def _unit_columns(pattern: Pattern) -> int:
    match pattern:
        case NM():
            return pattern.group
        case Block():
            return pattern.cols
        case _:
            return 1


def _choose(
    columns: Tensor, diagonal: Tensor, pattern: Pattern, density: float, start: int
) -> Tensor:
    """The support of one column block, chosen at its start; N:M is chosen during the sweep."""
    scores = (columns / diagonal).square()
    rows, width = columns.shape

    def quota(units_per_column: float) -> int:
        before = kept_count(round(units_per_column * start), density)
        return kept_count(round(units_per_column * (start + width)), density) - before

    match pattern:
        case NM():
            return torch.ones_like(scores, dtype=torch.bool)
        case Unstructured(scope="row"):
            return top_mask(scores, quota(1))
        case Unstructured(scope="column"):
            return top_mask(scores.t(), kept_count(rows, density)).t()
        case Unstructured():
            return top_mask(scores.reshape(1, -1), quota(rows)).reshape(scores.shape)
        case Block():
            grid = (rows // pattern.rows, width // pattern.cols)
            tiles = scores.reshape(grid[0], pattern.rows, grid[1], pattern.cols).sum(dim=(1, 3))
            kept = top_mask(tiles.reshape(1, -1), quota(grid[0] / pattern.cols)).reshape(grid)
            return kept.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
        case Channel():
            kept = top_mask(scores.sum(0, keepdim=True), quota(1))
            return kept.expand_as(scores).clone()


def _sweep(columns: Tensor, factor: Tensor, chosen: Tensor, pattern: Pattern) -> Tensor:
    """Prune `columns` in place, left to right, and return the scaled errors (rows, width).

    N:M groups are scored when reached, with the weights as updated so far.
    """
    errors = torch.empty_like(columns)
    diagonal = factor.diagonal()
    for j in range(columns.shape[1]):
        if isinstance(pattern, NM) and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            scores = (columns[:, group] / diagonal[group]).square()
            chosen[:, group] = top_mask(scores, pattern.keep)
        column = columns[:, j]
        removed = torch.where(chosen[:, j], torch.zeros((), dtype=column.dtype), column)
        errors[:, j] = removed / diagonal[j]
        columns[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
    return errors
