"""The compiled selection: float32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops import _dispatch

_SMALL = 1 << 16
"""Below so many scores a second thread costs more than it gains."""


def top(scores: Tensor, k: int, always: Tensor | None = None) -> Tensor | None:
    """The mask of `reference.top`, bit for bit, for float32 (rows, n) and 0 < k < n.

    None where a score is NaN, or where an infinite one could take the place of one of `always`.
    """
    rows = scores if always is None else scores.masked_fill(always, torch.inf)
    rows = rows.contiguous()
    mask = torch.empty(rows.shape, dtype=torch.bool)
    threads = 1 if rows.numel() < _SMALL else torch.get_num_threads()
    if not _dispatch.compiled().top_mask(rows, k, mask, threads):
        return None
    if always is not None and bool((always & ~mask).any()):
        return None
    return mask
