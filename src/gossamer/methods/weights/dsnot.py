"""DSnoT: swap kept and removed weights until a row's mean output error is gone.

Starts from what another method kept. In each output row it regrows a removed weight that takes the
row's mean error down, and removes a kept weight in its place. No weight is trained.

**Paper.** Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, 2023.
https://arxiv.org/abs/2310.08915

**Claim.** At 70% sparsity, LLaMA-7B has a perplexity 26.79 lower than with Wanda alone.

**Defaults.** Starts from Wanda; up to 50 swaps in a row; a row rests once its mean error is at most
0.1; variance to the power 1; attention layers alone, as feed-forward layers keep the start's choice
(`skip`). A row also rests before a swap that turns its error's sign, in N:M alone.

**Notes.** The error is the mean of the signed output error, summed over the tokens of a sequence. It
is not the squared error: a row without it may still be far off. The threshold of 0.1 is for windows
of 2048 tokens, so shorter windows make fewer swaps. Inputs of mean zero leave nothing to swap.
Fifty swaps are about 1% of a row of 4096 inputs, as LLaMA-7B has. In narrow layers they are a larger
share, so lower `cycles` there.

Any start serves, also one that repairs weights. The error is then that of the repaired weights,
and a weight that grows returns with its original value. The release instead builds a mask by
SparseGPT's scores on weights that it does not repair.

The variance here is that of all tokens. The release averages the variances of single sequences,
which leaves the spread between them out. `variance="within"` does so over batches: give batches of
one sequence for the release's figure. Where no weight of the wanted sign is left, a row rests. The
release goes on there and may regrow weights that were never removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.density import check_finite
from gossamer.core.errors import PatternError, UsageError
from gossamer.core.pattern import NM, Pattern, Unstructured, check_pattern, format_pattern
from gossamer.core.stats import LayerStats
from gossamer.core.support import Support
from gossamer.methods.weights.wanda import Wanda
from gossamer.ops.select import select

MLP = ("*.mlp.*", "*.fc1", "*.fc2")
"""Feed-forward layers, as Llama, Qwen, OPT and their like name them."""


@dataclass(frozen=True)
class DSnoT:
    """Swaps weights inside each output row, or inside N:M groups, by the sign of the mean error.

    It takes O(out * in log in) time. Each row keeps as many weights as at the start. The result's
    `figures` say by layer how many weights were swapped, and the mean absolute error of a row
    before and after.

    Parameters
    ----------
    start : Scorer or Solver
        The method that chooses first. Its statistics are gathered too, and its pattern is the
        default.
    cycles : int
        The most swaps in a row.
    threshold : float
        The absolute mean error, in units of the layer's outputs, at which a row rests.
    power : float
        Of the variance that divides a removed weight's contribution when it is ranked.
    variance : {"pooled", "within"}
        Of all tokens, or of the tokens of a batch, averaged over batches.
    same_sign : bool, optional
        Whether a row rests before a swap that turns the sign of its error. By default in N:M
        alone.
    skip : tuple of str or str
        `fnmatch` patterns on names of layers that keep the start's choice; `()` for none.

    References
    ----------
    Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs (2023).
    """

    start: Any = field(default_factory=Wanda)
    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    variance: Literal["pooled", "within"] = "pooled"
    same_sign: bool | None = None
    skip: tuple[str, ...] | str | None = MLP

    card: ClassVar[Card] = Card(
        name="dsnot",
        topic="weights",
        role="solver",
        needs=("norm", "sum", "variance"),
        patterns=("unstructured", "nm"),
        year=2023,
        link="https://arxiv.org/abs/2310.08915",
        status="experimental",
    )

    def __post_init__(self) -> None:
        role = getattr(getattr(self.start, "card", None), "role", None)
        if isinstance(self.start, type) or role not in ("scorer", "solver"):
            raise UsageError(
                f"DSnoT starts from a scorer or solver, such as Wanda(), not {self.start!r}"
            )
        if self.cycles < 0 or not self.threshold >= 0 or not self.power >= 0:
            raise UsageError("DSnoT needs cycles, threshold and power of at least 0")
        if self.variance not in ("pooled", "within"):
            raise UsageError(f"DSnoT: variance is pooled or within, not {self.variance!r}")

    @property
    def default_pattern(self) -> Pattern:
        """That of the method it starts from."""
        pattern: Pattern = self.start.default_pattern
        return pattern

    def solve(
        self, weight: Tensor, stats: LayerStats, pattern: Pattern, density: float
    ) -> tuple[Tensor, Support]:
        """The weight (out, in) after the swaps, in the weight's dtype, and its support.

        Raises UsageError without sums, variances and norms of the inputs, PatternError for a
        pattern that rows cannot keep, NonFiniteError naming the layer.
        """
        return self.solve_and_report(weight, stats, pattern, density)[:2]

    def solve_and_report(
        self, weight: Tensor, stats: LayerStats, pattern: Pattern, density: float
    ) -> tuple[Tensor, Support, Mapping[str, float]]:
        """What `solve` gives, and the figures `swaps`, `error_before` and `error_after`."""
        _check(weight, stats, pattern)
        first, support, scores = self._begin(weight, stats, pattern, density)
        skip = (self.skip,) if isinstance(self.skip, str) else self.skip or ()
        if any(fnmatchcase(stats.name, words) for words in skip):
            return first, support, {"swaps": 0}
        rows = _Rows(self, weight, first, support.mask, scores, stats, pattern)
        mask, report = rows.swapped()
        final = Support(mask, pattern, density)
        return final.apply(torch.where(support.mask, first, weight)), final, report

    def _begin(
        self, weight: Tensor, stats: LayerStats, pattern: Pattern, density: float
    ) -> tuple[Tensor, Support, Tensor]:
        """The start's weight and support, and the scores by which N:M groups lose weights."""
        if hasattr(self.start, "solve"):
            first, support = self.start.solve(weight, stats, pattern, density)
            return first.to(weight.dtype), support, Wanda().score(first, stats)
        scores = self.start.score(weight, stats)
        support = select(scores, pattern, density, stats.name)
        return support.apply(weight), support, scores


def _check(weight: Tensor, stats: LayerStats, pattern: Pattern) -> None:
    name, inputs = stats.name, weight.shape[1]
    check_pattern(pattern, weight.shape, name)
    if not isinstance(pattern, (NM, Unstructured)) or getattr(pattern, "scope", "row") not in (
        "row",
        "tensor",
    ):
        raise PatternError(
            f"{name}: DSnoT swaps weights inside rows, which {format_pattern(pattern)} does not "
            "allow; choose N:M, or unstructured ranked by row or tensor"
        )
    for what in (stats.sum, stats.variance, stats.norm):
        if what is None or what.shape != (inputs,) or stats.sequences < 1:
            raise UsageError(
                f"{name}: DSnoT needs sums, variances and norms of {inputs} inputs, and how many "
                "sequences they are of"
            )
    check_finite(weight, name)


class _Rows:
    """Every row of one layer at once: what may be swapped, in which order, and the error left."""

    def __init__(
        self,
        method: DSnoT,
        weight: Tensor,
        first: Tensor,
        kept: Tensor,
        scores: Tensor,
        stats: LayerStats,
        pattern: Pattern,
    ) -> None:
        assert stats.sum is not None and stats.variance is not None and stats.norm is not None
        self.method, self.kept, self.pattern = method, kept, pattern
        wide = torch.promote_types(weight.dtype, torch.float32)
        means = (stats.sum / stats.sequences).to(wide)
        spread = stats.variance if method.variance == "pooled" else stats.within
        if spread is None:
            raise UsageError(f"{stats.name}: DSnoT needs the variance inside batches")
        self.gain = weight.to(wide) * means
        """What a weight adds to its row's mean output when it grows."""
        self.loss = first.to(wide) * means
        self.scores = scores.to(wide)
        self.norms = stats.norm.to(wide)
        self.weight = first.to(wide)
        self.rank = self.gain / spread.to(wide).pow(method.power)
        self.error = (self.gain - self.loss).sum(dim=1, dtype=torch.float64)

    def swapped(self) -> tuple[Tensor, dict[str, float]]:
        """The mask after the swaps, and figures of what was done."""
        before = float(self.error.abs().mean()) if len(self.error) else 0.0
        mask, error = self.kept.clone(), self.error.clone()
        same_sign = self.method.same_sign
        same_sign = isinstance(self.pattern, NM) if same_sign is None else same_sign
        growth = self._growth()
        partners = _Groups(self) if isinstance(self.pattern, NM) else _Partners(self)
        every = torch.arange(len(error), device=error.device)
        active = torch.ones_like(error, dtype=torch.bool)
        swaps = 0
        for _ in range(self.method.cycles if mask.numel() else 0):
            side = (error <= 0).long()
            grow, some = growth.next(side)
            active &= some & (error.abs() > self.method.threshold)
            prune, free = partners.of(grow, side)
            after = error + self.loss[every, prune] - self.gain[every, grow]
            if same_sign:
                active &= ~free | (after.sign() == self.error.sign())
            if isinstance(partners, _Partners):
                active &= free
            now = active & free
            if not bool(active.any()):
                break
            mask[every[now], grow[now]] = True
            mask[every[now], prune[now]] = False
            error = torch.where(now, after, error)
            growth.take(side, active)
            partners.take(prune, side, now)
            swaps += int(now.sum())
        left = float(error.abs().mean()) if len(error) else 0.0
        return mask, {"swaps": swaps, "error_before": before, "error_after": left}

    def _growth(self) -> _Queues:
        """Removed weights whose return takes the error down, the largest of `rank` first."""
        gone = ~self.kept
        return _Queues(
            (-self.rank, gone & (self.gain > 0)), (self.rank, gone & (self.gain < 0)),
            self.method.cycles,
        )  # fmt: skip


class _Queues:
    """Two queues of columns in every row, the smallest key first; ties by index."""

    def __init__(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], most: int
    ) -> None:
        orders, counts = [], []
        for keys, members in (first, second):
            masked = torch.where(members, keys, torch.full((), torch.inf, dtype=keys.dtype))
            orders.append(masked.argsort(dim=1, stable=True)[:, : max(1, most)])
            counts.append(members.sum(dim=1).clamp(max=most))
        self.order, self.count = torch.stack(orders), torch.stack(counts)
        self.taken = torch.zeros_like(self.count)
        self.every = torch.arange(self.count.shape[1], device=self.count.device)

    def next(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """The next column of each row's queue `side` (rows,), and whether there is one."""
        at = self.taken[side, self.every]
        last = self.order.shape[2] - 1
        return self.order[side, self.every, at.clamp(max=last)], at < self.count[side, self.every]

    def take(self, side: Tensor, rows: Tensor) -> None:
        """Go on behind the columns that these rows (a bool mask) looked at."""
        self.taken[side[rows], self.every[rows]] += 1


class _Partners:
    """Kept weights of a row that may go: their contribution has the other sign than the error,
    and Wanda's score is smallest."""

    def __init__(self, rows: _Rows) -> None:
        scores = rows.weight.abs() * rows.norms
        kept, loss = rows.kept, rows.loss
        self.queues = _Queues(
            (scores, kept & (loss < 0)), (scores, kept & (loss > 0)), rows.method.cycles
        )

    def of(self, grow: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """The partner of each row's growing weight, and whether there is one."""
        return self.queues.next(side)

    def take(self, prune: Tensor, side: Tensor, now: Tensor) -> None:
        """These partners have gone."""
        self.queues.take(side, now)


class _Groups:
    """Kept weights of the growing weight's own group, the lowest of the start's scores first."""

    def __init__(self, rows: _Rows) -> None:
        assert isinstance(rows.pattern, NM)
        self.group = rows.pattern.group
        self.free = torch.where(
            rows.kept, rows.scores, torch.full((), torch.inf, dtype=rows.scores.dtype)
        )
        self.every = torch.arange(len(rows.kept), device=rows.kept.device)

    def of(self, grow: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """The partner of each row's growing weight, and whether there is one."""
        begin = grow - grow % self.group
        columns = begin[:, None] + torch.arange(self.group, device=grow.device)
        scores = self.free.gather(1, columns)
        place = scores.argmin(dim=1)
        return begin + place, scores[self.every, place].isfinite()

    def take(self, prune: Tensor, side: Tensor, now: Tensor) -> None:
        """These partners have gone, and do not return."""
        self.free[self.every[now], prune[now]] = torch.inf
