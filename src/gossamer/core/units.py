"""The units that a pattern keeps or removes whole: their scores, and their masks as weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gossamer.core.pattern import NM, Block, Channel, Pattern, Unstructured


def unit_scores(scores: Tensor, pattern: Pattern) -> Tensor:
    """Scores of units, (rankings, candidates): each row is ranked for itself.

    scores: (out, in), or any shape for `Unstructured()` over the tensor. A unit's score is the sum
    of its weights' scores.
    """
    match pattern:
        case Unstructured(scope="row"):
            return scores
        case Unstructured(scope="column"):
            return scores.t()
        case Unstructured():
            return scores.reshape(1, -1)
        case NM():
            return scores.reshape(-1, pattern.group)
        case Block():
            rows, cols = _grid(scores.shape, pattern)
            tiles = scores.reshape(rows, pattern.rows, cols, pattern.cols)
            return tiles.sum(dim=(1, 3)).reshape(1, -1)
        case Channel():
            return scores.sum(dim=1 - pattern.dim).reshape(1, -1)


def expand_units(kept: Tensor, shape: Sequence[int], pattern: Pattern) -> Tensor:
    """The contiguous mask of a weight of `shape`, from the mask of what `unit_scores` gives."""
    match pattern:
        case Unstructured(scope="column"):
            return kept.reshape(shape[1], shape[0]).t().contiguous()
        case Block():
            tiles = kept.reshape(_grid(shape, pattern))
            return tiles.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
        case Channel():
            return kept.reshape(-1).unsqueeze(1 - pattern.dim).expand(shape).contiguous()
        case _:
            return kept.reshape(shape)


def _grid(shape: Sequence[int], pattern: Block) -> tuple[int, int]:
    return shape[0] // pattern.rows, shape[1] // pattern.cols
