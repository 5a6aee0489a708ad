"""A linear layer whose weight is a product of thin matrices plus a sparse matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gossamer.nn.foldable import Foldable, linear_of


class LowRankSparseLinear(Foldable):
    """y = x (scale up down + S)^T + bias, where S holds `values` at fixed places.

    Parameters
    ----------
    up : Tensor
        (out, rank).
    down : Tensor
        (rank, in).
    values : Tensor
        (nnz,), the numbers of S.
    support : Tensor
        (nnz,), int64 places in the matrix (out, in), row by row, ascending.
    scale : float
        Of the product of the thin matrices.
    bias : Tensor, optional
        (out,).

    The dense weight is formed at every forward and again in the backward pass, not kept between.
    """

    support: Tensor

    def __init__(
        self, up: Tensor, down: Tensor, values: Tensor, support: Tensor, scale: float,
        bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = up.shape[0], down.shape[1]
        self.scale = scale
        self.up, self.down, self.values = map(nn.Parameter, (up, down, values))
        self.register_buffer("support", support)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product = _Product.apply(x, self.up, self.down, self.values, self.support, self.scale)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """A new Linear with the same weight; outputs differ by rounding of the bias alone."""
        weight = _dense(self.up, self.down, self.values, self.support, self.scale)
        return linear_of(self, nn.Parameter(weight, self.up.requires_grad))


def _dense(up: Tensor, down: Tensor, values: Tensor, support: Tensor, scale: float) -> Tensor:
    """The weight (out, in)."""
    weight = up @ (scale * down)
    weight.view(-1).index_add_(0, support, values)
    return weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, down: Tensor, values: Tensor, support: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, up, down, values, support)
        ctx.scale = scale
        mixed = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            weight = _dense(up, down, values, support, scale)
            return F.linear(x, weight.to(x.dtype) if mixed else weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, values, support = ctx.saved_tensors
        scale = ctx.scale
        found: list[Tensor | None] = [None] * 6
        if ctx.needs_input_grad[0]:
            weight = _dense(up, down, values, support, scale)
            found[0] = gradient @ weight.to(gradient.dtype)
        if any(ctx.needs_input_grad[1:4]):
            flat = gradient.reshape(-1, gradient.shape[-1])
            whole = (flat.t() @ x.reshape(-1, x.shape[-1])).to(up.dtype)
            found[1] = whole @ (scale * down).t()
            found[2] = scale * (up.t() @ whole)
            found[3] = whole.reshape(-1)[support]
        return tuple(found)
