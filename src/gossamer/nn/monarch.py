"""Monarch matrices: two block-diagonal factors around a fixed permutation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.nn.foldable import Foldable, linear_of


def monarch_multiply(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x (..., k p) times both factors, to (..., s l).

    first: (k, q, p), a block from each part of the input. second: (l, s, r) with l r = k q. What
    lies between is read as (r, l), l fastest; so is the output as (s, l).
    """
    blocks, _, width = first.shape
    groups, _, depth = second.shape
    between = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (blocks, width)), first)
    mixed = between.flatten(-2).unflatten(-1, (depth, groups))
    return torch.einsum("...rl,lsr->...sl", mixed, second).flatten(-2)


def monarch_project(
    weight: Tensor, blocks_in: int, blocks_out: int, rank: int
) -> tuple[Tensor, Tensor]:
    """The factors of the Monarch matrix nearest to a weight (out, in), in the Frobenius norm.

    Each slice that takes one of `blocks_in` parts of the input to every `blocks_out`-th output is
    replaced by its best approximation of this rank. Sides must divide.
    """
    slices = weight.reshape(-1, blocks_out, blocks_in, weight.shape[1] // blocks_in)
    left, sizes, right = torch.linalg.svd(slices.permute(1, 2, 0, 3).float(), full_matrices=False)
    root = sizes[..., :rank].sqrt()
    left, right = left[..., :rank] * root.unsqueeze(-2), right[..., :rank, :] * root.unsqueeze(-1)
    # (k, r, p, i) to (k, p, (r i)), and (k, r, i, s) to (r, (i k), s).
    second = left.permute(0, 2, 1, 3).flatten(2)
    first = right.permute(1, 2, 0, 3).flatten(1, 2)
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


class MonarchLinear(Foldable):
    """y = x M^T + bias, where M multiplies by `first` and then by `second`.

    Parameters
    ----------
    in_features, out_features : int
        May be smaller than the factors' sides: then inputs are padded by zeros and outputs cut.
    first : Tensor
        (blocks, q, p), with blocks p at least the inputs.
    second : Tensor
        (groups, s, r), with groups r = blocks q and groups s at least the outputs.
    bias : Tensor, optional
        (out,).
    """

    def __init__(
        self, in_features: int, out_features: int, first: Tensor, second: Tensor,
        bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        width = self.first.shape[0] * self.first.shape[2]
        y = monarch_multiply(F.pad(x, (0, width - x.shape[-1])), self.first, self.second)
        y = y[..., : self.out_features]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """A new Linear with the factors multiplied out; outputs agree to rounding, about 1e-6 of
        their size in float32."""
        width = self.first.shape[0] * self.first.shape[2]
        first, second = self.first.double(), self.second.double()
        eye = torch.eye(self.in_features, width, dtype=first.dtype, device=first.device)
        product = monarch_multiply(eye, first, second)[:, : self.out_features]
        weight = product.t().to(self.first.dtype).contiguous()
        return linear_of(self, nn.Parameter(weight, self.first.requires_grad))
