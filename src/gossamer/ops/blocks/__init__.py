"""Products with a matrix whose weights are kept or dropped in blocks: block compressed rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.blocks import native, reference
from gossamer.ops.csr.reference import index

__all__ = ["HEIGHTS", "Blocks", "build", "kernel_name", "linear"]

HEIGHTS = (1, 2, 4, 8, 16)
"""Rows of a block that the kernels serve."""


@dataclass(frozen=True)
class Blocks:
    """values (blocks, C, R), float32 or bfloat16: column after column of each block of R rows.

    columns int32 (blocks,), where each begins; splits int64 (ceil(in / 1024) + 1, out / R), the
    first block of each block row at or past every 1024th column. Made by `build`, which is what
    the kernels trust.
    """

    values: Tensor
    columns: Tensor
    splits: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.values.nbytes + self.columns.nbytes + self.splits.nbytes


def kernel_name() -> str:
    """The kernel that serves here, such as `block-spmm/avx512`."""
    return f"block-spmm/{_dispatch.isa()}"


def build(matrix: Tensor, keeps: Tensor, block: tuple[int, int]) -> Blocks | None:
    """The blocks (R, C) of a matrix (out, in) where `keeps`, bool (out, in), is true.

    None where the kernels do not serve R, the block does not divide the matrix, or one is kept in
    part: its zeros would multiply inputs that they must not touch. O(out * in).
    """
    (out, width), (block_height, block_width) = matrix.shape, block
    if block_height not in HEIGHTS or block_width < 1 or out % block_height or width % block_width:
        return None
    if matrix.dtype not in (torch.float32, torch.bfloat16):
        return None
    tiles = keeps.reshape(out // block_height, block_height, width // block_width, block_width)
    kept = tiles.any(dim=3).any(dim=1)
    if int(kept.sum()) * block_height * block_width != int(keeps.sum()):
        return None
    rows, columns = kept.nonzero(as_tuple=True)
    values = matrix.detach().reshape(tiles.shape).permute(0, 2, 3, 1)[kept].contiguous()
    splits = index(rows, columns * block_width, (out // block_height, width))
    return Blocks(values, (columns * block_width).int(), splits, (out, width))


def linear(x: Tensor, weight: Blocks, bias: Tensor | None = None) -> Tensor:
    """x (..., in), float32 or bfloat16, times the matrix transposed, plus bias (out,).

    The result has x's dtype; sums are float32. O(rows of x * kept). Blocks that are not kept touch
    nothing, even where x is NaN. Not differentiable. Raises UsageError for another width or dtype.
    """
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"expected inputs of width {weight.shape[1]}, not {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu:
        raise UsageError(f"inputs are float32 or bfloat16 on the CPU, not {x.dtype} on {x.device}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise UsageError(f"bias has shape {tuple(bias.shape)}, not ({weight.shape[0]},)")
    parts = (weight.values, weight.columns, weight.splits)
    if _dispatch.direct(x, bias):
        return _dispatch.backend(reference, native).linear(x, *parts, bias)
    return _blocks_linear(x, *parts, bias)


@torch.library.custom_op("gossamer::blocks_linear", mutates_args=())
def _blocks_linear(
    x: Tensor, values: Tensor, columns: Tensor, splits: Tensor, bias: Tensor | None
) -> Tensor:
    backend = _dispatch.backend(reference, native)
    return _dispatch.owned(backend.linear(x, values, columns, splits, bias))


@_blocks_linear.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, splits: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], splits.shape[1] * values.shape[2])
