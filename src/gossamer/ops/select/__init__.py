"""Selection: from scores to what is kept. Every choice of the highest scores is made here.

`select` and `select_global` choose what is stored, by a pattern and a density. `keep` chooses per
input, by a budget. Counts are exact and ties keep the lower index, on every device. float32 and
shorter scores on the CPU are ranked by a compiled kernel.

NaN is never hidden. Scores of weights that hold NaN or infinity are refused by name. For `keep`,
which cannot look without waiting for the device, NaN counts as the highest score: it is kept, and
so shows in the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]

from gossamer.core.budget import BatchTopK, Budget, Fraction, Threshold, TopP
from gossamer.core.density import check_density, check_finite, kept_count
from gossamer.core.errors import PatternError, UsageError
from gossamer.core.pattern import NM, Pattern, check_pattern
from gossamer.core.support import Support
from gossamer.core.units import expand_units, unit_scores
from gossamer.ops import _dispatch
from gossamer.ops.select import native, reference

__all__ = ["keep", "select", "select_global"]

_HALVES = (torch.float16, torch.bfloat16)


def select(scores: Tensor, pattern: Pattern, density: float, name: str = "") -> Support:
    """Keep the highest-scored units of one tensor.

    Parameters
    ----------
    scores : Tensor
        Any real dtype, on any device; (out, in), or any shape for `Unstructured()`. A unit's score
        is the sum of its weights' scores.
    pattern : Unstructured, NM, Block or Channel
        Which weights are kept or removed together, and over what a ranking runs.
    density : float
        The fraction kept, 0 < density <= 1. The number kept is exact: the nearest whole number of
        units in each ranking, halves upward, and `keep` in every N:M group.
    name : str
        The tensor's name in errors.

    Returns
    -------
    Support
        The kept positions, contiguous, with pattern and requested density.

    Raises
    ------
    NonFiniteError
        A score is NaN or infinite.
    PatternError
        The pattern does not divide the shape, or the density contradicts an N:M pattern.
    UsageError
        The density is outside (0, 1].

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> scores = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    >>> gs.select(scores, gs.NM(2, 4), 0.5).mask
    tensor([[ True, False, False,  True]])
    """
    density = check_density(density)
    check_pattern(pattern, scores.shape, name)
    check_finite(scores, name or "scores")
    if isinstance(pattern, NM):
        _check_nm_density(pattern, density)
    if scores.numel() == 0:
        return Support(torch.ones_like(scores, dtype=torch.bool), pattern, density)
    ranking = unit_scores(_rankable(scores), pattern)
    k = pattern.keep if isinstance(pattern, NM) else kept_count(ranking.shape[-1], density)
    return Support(expand_units(_top(ranking, k), scores.shape, pattern), pattern, density)


def select_global(
    scores: Mapping[str, Tensor], pattern: Pattern, density: float, floor: int = 0
) -> dict[str, Support]:
    """Keep the highest-scored units over several tensors ranked together.

    The budget is counted in weights: units, which may differ in size between tensors, are taken
    from the highest score per weight until the budget is met. The count is exact for unstructured
    patterns and within one unit otherwise. Ties keep the earlier tensor and index.

    Parameters
    ----------
    scores : mapping of str to Tensor
        By name, as `select` takes them.
    pattern : Unstructured, Block or Channel
        The units. Its scope does not count: all tensors are one ranking.
    density : float
        The fraction of all weights that is kept, 0 < density <= 1.
    floor : int
        Units that each tensor keeps at least, its highest, so that no layer is cut off. They count
        against the budget, and are kept where they exceed it.

    Returns
    -------
    dict of str to Support
        The kept positions of each tensor.

    Raises
    ------
    NonFiniteError
        A score is NaN or infinite.
    PatternError
        The pattern is N:M or does not divide a shape.
    UsageError
        The density is outside (0, 1], or the floor is no whole number from 0.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> scores = {"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([[4.0, 3.0]])}
    >>> supports = gs.select_global(scores, gs.Unstructured(), 0.5)
    >>> supports["b"].mask
    tensor([[ True, False]])
    """
    density = check_density(density)
    if isinstance(floor, bool) or not isinstance(floor, int) or floor < 0:
        raise UsageError(f"floor is a whole number from 0, not {floor!r}")
    if isinstance(pattern, NM):
        raise PatternError("N:M fixes the density of every group; a global ranking cannot apply")
    if not scores:
        return {}
    parts, sizes, floors = [], [], []
    for name, score in scores.items():
        check_pattern(pattern, score.shape, name)
        check_finite(score, name)
        units = unit_scores(_rankable(score), pattern).reshape(-1)
        size = score.numel() // max(1, units.numel())
        parts.append(units / size if size > 1 else units)
        sizes.append(size)
        floors.append(_top(units, floor) if floor else torch.zeros_like(units, dtype=torch.bool))
    mask = _within_budget(parts, sizes, density, torch.cat(floors) if floor else None)
    split = mask.split([part.numel() for part in parts])
    return {
        name: Support(expand_units(kept, score.shape, pattern), pattern, density)
        for (name, score), kept in zip(scores.items(), split, strict=True)
    }


def keep(scores: Tensor, budget: Budget, always: Tensor | None = None) -> Tensor:
    """Choose the units of each input that have the highest scores.

    A score of minus infinity marks what may not be chosen, such as a later token: it is never kept.
    NaN counts as the highest score, so that it shows in the result. Follows vmap and
    `torch.compile`, and does not wait for the device.

    Parameters
    ----------
    scores : Tensor
        Any real dtype, on any device; (..., units). Each row along the last dimension is an input.
    budget : TopK, TopP, Threshold, Fraction or BatchTopK
        How many units are kept.
    always : Tensor, optional
        bool, broadcast to the shape of `scores`: units that are kept in any case, such as sinks and
        recent tokens. They count against the budget, so that TopK(k) keeps k units with them too.
        Where they exceed it they alone are kept.

    Returns
    -------
    Tensor
        bool, the shape of `scores`: True where kept. Ties keep the lower index.

    Raises
    ------
    UsageError
        `budget` is none, or `always` is not bool or does not fit.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> scores = torch.tensor([0.1, 0.4, 0.2, 0.3])
    >>> gs.keep(scores, gs.TopK(2))
    tensor([False,  True, False,  True])
    >>> gs.keep(scores, gs.TopP(0.6))
    tensor([False,  True, False,  True])
    >>> sinks = torch.tensor([True, False, False, False])
    >>> gs.keep(scores, gs.TopK(2), always=sinks)
    tensor([ True,  True, False, False])
    """
    if not isinstance(budget, Budget):
        raise UsageError(f"budget is TopK, TopP, Threshold, Fraction or BatchTopK, not {budget!r}")
    if scores.dim() == 0 or scores.is_complex():
        raise UsageError(f"scores are real, (..., units), not {scores.dtype} {scores.shape}")
    if always is not None:
        always = _fitted(always, scores.shape)
    ranked = _rankable(scores)
    kept = _kept(ranked, budget, always)
    if ranked.is_floating_point() and not isinstance(budget, Threshold):
        kept = kept & (ranked != -torch.inf)
    return kept if always is None else kept | always


def _kept(scores: Tensor, budget: Budget, always: Tensor | None) -> Tensor:
    if isinstance(budget, Threshold):
        if scores.is_floating_point():
            return ~(scores <= budget.value)  # NaN is neither above nor below, and kept
        return scores.long() > max(-(2**63), min(math.floor(budget.value), 2**63 - 1))
    if isinstance(budget, TopP):
        return reference.top_p(scores, budget.p, always)
    if isinstance(budget, BatchTopK):
        count = math.floor(budget.k * math.prod(scores.shape[:-1]))
        flat = None if always is None else always.reshape(1, -1)
        return _top(scores.reshape(1, -1), count, flat).reshape(scores.shape)
    if isinstance(budget, Fraction):
        return _top(scores, kept_count(scores.shape[-1], budget.fraction), always)
    return _top(scores, budget.k, always)


def _top(scores: Tensor, k: int, always: Tensor | None = None) -> Tensor:
    """`reference.top`, by the kernel where that serves; scores as `_rankable` gives them."""
    n = scores.shape[-1]
    if 0 < k < n and scores.numel() and _compiled(scores):
        rows = None if always is None else always.reshape(-1, n)
        mask = native.top(scores.reshape(-1, n), k, rows)
        if mask is not None:
            return mask.reshape(scores.shape)
    return reference.top(scores, k, always)


def _compiled(scores: Tensor) -> bool:
    """Whether the kernel serves: float32 numbers in the CPU's memory that nothing traces."""
    if not scores.is_cpu or scores.dtype != torch.float32 or not _dispatch.direct(scores):
        return False
    return not is_tracing() and not _dispatch.transformed() and _dispatch.isa_index() >= 0


def _rankable(scores: Tensor) -> Tensor:
    """Detached; half precision and bool as float32, which holds them and their sums."""
    scores = scores.detach()
    return scores.float() if scores.dtype in _HALVES or scores.dtype == torch.bool else scores


def _fitted(always: Tensor, shape: torch.Size) -> Tensor:
    if always.dtype != torch.bool:
        raise UsageError(f"always is a bool mask, not {always.dtype}")
    try:
        return always.expand(shape)
    except RuntimeError:
        raise UsageError(
            f"always has shape {tuple(always.shape)}, which does not fit scores of {tuple(shape)}"
        ) from None


def _check_nm_density(pattern: NM, density: float) -> None:
    if abs(density - pattern.density) > 1e-9:
        raise PatternError(
            f"{pattern.keep}:{pattern.group} keeps {pattern.density:g} of the weights; a density "
            f"of {density:g} contradicts it (leave density out)"
        )


def _within_budget(
    parts: Sequence[Tensor], sizes: Sequence[int], density: float, always: Tensor | None
) -> Tensor:
    """Greedy by score until the budget in weights is met; a partition when all units are equal."""
    scores = torch.cat(list(parts))
    counts = [part.numel() for part in parts]
    total = sum(count * size for count, size in zip(counts, sizes, strict=True))
    budget = kept_count(total, density)
    if len({size for size, count in zip(sizes, counts, strict=True) if count}) <= 1:
        rows = None if always is None else always.reshape(1, -1)
        kept = _top(scores.reshape(1, -1), budget // max(1, *sizes), rows).reshape(-1)
        return kept if always is None else kept | always
    ranked = scores if always is None else scores.masked_fill(always, torch.inf)
    order = torch.argsort(ranked, descending=True, stable=True)
    size_of = torch.tensor(sizes).repeat_interleave(torch.tensor(counts)).to(scores.device)
    mask = torch.zeros_like(scores, dtype=torch.bool) if always is None else always.clone()
    mask[order[size_of[order].cumsum(0) <= budget]] = True
    return mask
