"""Selection: from scores, a pattern and a density to the exact set of kept units.

One routine serves every pattern: reduce scores to units, keep the top k, expand to weights.
The threshold comes from a partition (`kthvalue`), never from a full sort: O(n) per ranking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from gossamer.core.errors import NonFiniteError, PatternError, UsageError
from gossamer.core.pattern import NM, Block, Channel, Pattern, Unstructured, check_pattern
from gossamer.core.support import Support

Ranker: TypeAlias = Callable[[Tensor, int], Tensor]
"""What `top_mask` is, and what `ops.statistics.top_mask` does faster: this layer imports none."""


def kept_count(n: int, density: float) -> int:
    """How many of `n` units a density keeps: the nearest whole number, halves upward."""
    return min(n, math.floor(density * n + 0.5))


def check_density(density: float) -> float:
    """Return the density as a float; raise UsageError unless 0 < density <= 1."""
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise UsageError(f"density is a number in (0, 1], not {density!r}")
    if not 0.0 < density <= 1.0:
        raise UsageError(f"density is the fraction kept, in (0, 1], not {density}")
    return float(density)


def top_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the `k` largest along the last axis of (rows, n); ties keep the lower index.

    Exact count in every row. O(rows * n).
    """
    n = scores.shape[-1]
    if k <= 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(scores, n - k + 1, dim=-1, keepdim=True).values
    above = scores > threshold
    tied = scores == threshold
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def select(
    scores: Tensor, pattern: Pattern, density: float, name: str = "", top: Ranker = top_mask
) -> Support:
    """Keep the highest-scored units of one tensor.

    The number kept is exact: `kept_count(units, density)` per ranking, and `keep` in every N:M
    group. A unit's score is the sum of its weights' scores.

    Parameters
    ----------
    scores : Tensor
        Of any real dtype. (out, in) for every pattern, any shape for `Unstructured()` over the
        tensor.
    pattern : Pattern
        Which weights are kept together.
    density : float
        The fraction kept, in (0, 1].
    name : str
        Of the layer, for errors.
    top : callable
        What ranks, as `top_mask` does.

    Returns
    -------
    Support
        The kept positions.

    Raises
    ------
    NonFiniteError
        On NaN or infinite scores.
    PatternError
        When the pattern does not divide the shape, or the density contradicts an N:M pattern.
    UsageError
        For a density outside (0, 1].
    """
    density = check_density(density)
    check_pattern(pattern, scores.shape, name)
    check_finite(scores, name or "scores")
    if isinstance(pattern, NM):
        _check_nm_density(pattern, density)
    if scores.numel() == 0:
        return Support(torch.ones_like(scores, dtype=torch.bool), pattern, density)
    units, ranking = _units(_rankable(scores.detach()), pattern)
    k = pattern.keep if isinstance(pattern, NM) else kept_count(ranking.shape[-1], density)
    mask = _expand(top(ranking, k), units.shape, scores.shape, pattern)
    return Support(mask, pattern, density)


def select_global(
    scores: Mapping[str, Tensor], pattern: Pattern, density: float, top: Ranker = top_mask
) -> dict[str, Support]:
    """Keep the highest-scored units over several tensors ranked together.

    The budget is counted in weights, since units may differ in size between tensors. Units are
    taken from the highest score per weight until the budget is met. So the count is exact for
    unstructured patterns, and within one unit otherwise. Ties keep the earlier tensor and index.

    Parameters
    ----------
    scores : mapping of str to Tensor
        By the name of the layer.
    pattern : Pattern
        Which weights are kept together.
    density : float
        The fraction kept over all tensors, in (0, 1].
    top : callable
        What ranks, as `top_mask` does.

    Returns
    -------
    dict of str to Support
        The kept positions by the name of the layer.
    """
    density = check_density(density)
    if isinstance(pattern, NM):
        raise PatternError("N:M fixes the density of every group; a global ranking cannot apply")
    if not scores:
        return {}
    units: dict[str, Tensor] = {}
    flat, sizes = [], []
    for name, score in scores.items():
        check_pattern(pattern, score.shape, name)
        check_finite(score, name)
        reduced, _ = _units(_rankable(score.detach()), pattern)
        units[name] = reduced
        weight_of_unit = score.numel() // max(1, reduced.numel())
        flat.append(reduced.reshape(-1) / max(1, weight_of_unit))
        sizes.append(weight_of_unit)
    mask = _budget_mask(flat, sizes, density, top)
    supports, start = {}, 0
    for name, score in scores.items():
        part = mask[start : start + units[name].numel()]
        start += units[name].numel()
        full = _expand(part, units[name].shape, score.shape, pattern)
        supports[name] = Support(full, pattern, density)
    return supports


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise NonFiniteError naming the tensor when it holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{name}: holds NaN or inf, so it cannot be ranked")


def _check_nm_density(pattern: NM, density: float) -> None:
    if abs(density - pattern.density) > 1e-9:
        raise PatternError(
            f"{pattern.keep}:{pattern.group} keeps {pattern.density:g} of the weights; a density "
            f"of {density:g} contradicts it (leave density out)"
        )


def _rankable(scores: Tensor) -> Tensor:
    """Half-precision and integer scores rank without overflow or missing operators."""
    if scores.dtype in (torch.float16, torch.bfloat16, torch.bool):
        return scores.float()
    return scores


def _units(scores: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(scores of units in their own layout, the same as (rankings, candidates))."""
    match pattern:
        case Unstructured(scope="row"):
            return scores, scores
        case Unstructured(scope="column"):
            return scores, scores.t()
        case Unstructured():
            return scores, scores.reshape(1, -1)
        case NM():
            return scores, scores.reshape(-1, pattern.group)
        case Block():
            rows, cols = scores.shape
            tiles = scores.reshape(
                rows // pattern.rows, pattern.rows, cols // pattern.cols, pattern.cols
            ).sum(dim=(1, 3))
            return tiles, tiles.reshape(1, -1)
        case Channel():
            sums = scores.sum(dim=1 - pattern.dim)
            return sums, sums.reshape(1, -1)


def _expand(mask: Tensor, units: torch.Size, shape: torch.Size, pattern: Pattern) -> Tensor:
    """From the mask of a ranking back to a contiguous mask of the weight's shape."""
    match pattern:
        case Unstructured(scope="column"):
            return mask.t().contiguous()
        case Block():
            tiles = mask.reshape(units)
            return tiles.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
        case Channel():
            return mask.reshape(units).unsqueeze(1 - pattern.dim).expand(shape).contiguous()
        case _:
            return mask.reshape(shape)


def _budget_mask(flat: list[Tensor], sizes: list[int], density: float, top: Ranker) -> Tensor:
    """Greedy by score until the budget in weights is met; a partition when all units are equal."""
    scores = torch.cat(flat)
    counts = torch.tensor([part.numel() for part in flat])
    total = int((counts * torch.tensor(sizes)).sum())
    budget = kept_count(total, density)
    if len({size for size, part in zip(sizes, flat, strict=True) if part.numel()}) <= 1:
        return top(scores.reshape(1, -1), budget // max(1, max(sizes))).reshape(-1)
    size_of = torch.tensor(sizes).repeat_interleave(counts)
    order = torch.argsort(scores, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[size_of[order].cumsum(0) <= budget]] = True
    return mask
