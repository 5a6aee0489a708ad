"""Selection in plain torch: any device and dtype, and what vmap and compilers follow.

The bar comes from a partition (`kthvalue`), not from a full sort. NaN is above every number, for
`kthvalue` and `sort` as well. Nothing here waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def top(scores: Tensor, k: int, always: Tensor | None = None) -> Tensor:
    """Mask of the `k` highest along the last dimension, `always` first; ties keep the lower index.

    scores: (..., n). always: bool, the shape of scores. O(scores).
    """
    n = scores.shape[-1]
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if k <= 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool) if always is None else always.clone()
    keys = _first(scores, always)
    bar = torch.kthvalue(keys, n - k + 1, dim=-1, keepdim=True).values
    return _exactly(keys, bar, k, always)


def top_p(scores: Tensor, p: float, always: Tensor | None = None) -> Tensor:
    """Mask of the fewest highest whose sum reaches `p` times the row's, `always` first.

    A score below 0 has no mass. NaN units are kept and have none either. O(n log n) per row.
    """
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores if scores.is_floating_point() else scores.float()
    holes = torch.isnan(scores)
    always = holes if always is None else always | holes
    mass = scores.masked_fill(holes, 0).clamp(min=0)
    keys, order = torch.sort(_first(mass, always), dim=-1, descending=True, stable=True)
    sums = mass.gather(-1, order).cumsum(dim=-1)
    before = functional.pad(sums[..., :-1], (1, 0))
    count = (before < p * sums[..., -1:]).sum(dim=-1, keepdim=True)
    bar = keys.gather(-1, (count - 1).clamp(min=0))
    return _exactly(_first(mass, always), bar, count, always)


def _first(scores: Tensor, always: Tensor | None) -> Tensor:
    """Scores by which no unit ranks above one of `always`."""
    if always is None:
        return scores
    most = torch.nan if scores.is_floating_point() else torch.iinfo(scores.dtype).max
    return scores.masked_fill(always, most)


def _exactly(keys: Tensor, bar: Tensor, count: int | Tensor, always: Tensor | None) -> Tensor:
    """`count` of the keys from `bar`, the count-th highest, upward: the tied ones by index."""
    above, tied = keys > bar, keys == bar
    if keys.is_floating_point():
        hole, limit = torch.isnan(keys), torch.isnan(bar)
        above, tied = above | (hole & ~limit), tied | (hole & limit)
    if always is not None:
        above, tied = above | always, tied & ~always
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))
