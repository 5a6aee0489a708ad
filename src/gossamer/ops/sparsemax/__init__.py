"""Sparsemax: the point of the simplex nearest to a row of logits. Most entries are exactly 0."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import UsageError

__all__ = ["sparsemax"]


def sparsemax(logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """Project rows of logits onto the probability simplex.

    Differentiable any number of times: the gradient on the support is the incoming one less its
    mean there, and 0 elsewhere. Sums are float32 for shorter dtypes. NaN shows in its whole row.

    Parameters
    ----------
    logits : Tensor
        Floating; minus infinity has probability 0.
    dim : int
        The axis whose entries sum to 1.
    mask : Tensor or None
        bool, broadcast to the logits: False for padding, which has probability 0. A row without any
        entry is all 0.

    Returns
    -------
    Tensor
        Of the shape and dtype of the logits.

    Examples
    --------
    >>> import torch
    >>> from gossamer.ops.sparsemax import sparsemax
    >>> sparsemax(torch.tensor([1.0, 0.5, -1.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    if not logits.is_floating_point() or not -logits.dim() <= dim < logits.dim():
        raise UsageError(
            f"sparsemax takes floating logits and one of their axes, not {logits.dtype} "
            f"{tuple(logits.shape)} and dim {dim}"
        )
    scores = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if mask is not None:
        if mask.dtype != torch.bool:
            raise UsageError(f"a mask is bool, not {mask.dtype}")
        try:
            mask = mask.expand(logits.shape)
        except RuntimeError:
            raise UsageError(
                f"a mask of {tuple(mask.shape)} does not fit logits of {tuple(logits.shape)}"
            ) from None
        scores = scores.masked_fill(~mask, -torch.inf)
    if not scores.shape[dim]:
        return logits.clone()
    found = _projected(scores.movedim(dim, -1)).movedim(-1, dim)
    return found.to(logits.dtype)


def _projected(scores: Tensor) -> Tensor:
    """Along the last axis. The support is found without gradient; what lies in it is linear."""
    support, highest = _support(scores.detach())
    inside = torch.where(support, scores - highest, 0.0)
    count = support.sum(-1, keepdim=True).clamp(min=1)
    threshold = (inside.sum(-1, keepdim=True) - 1) / count
    found = torch.where(support, (inside - threshold).clamp(min=0), 0.0)
    return torch.where(highest.isnan(), highest, found)


def _support(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries are above 0, and each row's maximum: 0 where it has no entry, else NaN or finite."""
    highest = scores.amax(-1, keepdim=True)
    empty = highest == -torch.inf
    shifted = torch.where(empty, -torch.inf, scores - highest)
    ordered = shifted.sort(dim=-1, descending=True).values
    number = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    finite = torch.where(ordered == -torch.inf, 0.0, ordered)
    taken = (1 + number * ordered > finite.cumsum(-1)) & (ordered != -torch.inf)
    count = taken.sum(-1, keepdim=True)
    total = torch.where(taken, finite, 0.0).sum(-1, keepdim=True)
    threshold = (total - 1) / count.clamp(min=1)
    highest = torch.where(empty, 0.0, highest)
    return (shifted > threshold) & (shifted != -torch.inf), highest.where(
        highest != torch.inf, torch.nan
    )
