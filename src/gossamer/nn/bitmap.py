"""A linear layer whose weight is stored as kept values and a bitmap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.ops import bitmap as ops


class BitmapLinear(nn.Module):
    """y = x W^T + b with W (out, in) packed; takes the place of a Linear of the same shape.

    values: (nnz,), float32 or bfloat16. bitmap: uint8 (out, 8 * ceil(in / 64)). Moving the module
    to another floating dtype converts the values; other devices than the CPU are refused when
    called. Raises FormatError when the parts contradict each other.
    """

    values: Tensor
    bitmap: Tensor
    row_ptr: Tensor

    def __init__(
        self,
        values: Tensor,
        bitmap: Tensor,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        pattern: str = "",
        density_requested: float | None = None,
    ) -> None:
        super().__init__()
        if values.dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"packed values are float32 or bfloat16, not {values.dtype}")
        if bitmap.dim() != 2 or bitmap.shape[0] != out_features:
            raise UsageError(f"bitmap has shape {tuple(bitmap.shape)}, not {out_features} rows")
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.density_requested = pattern, density_requested
        self.register_buffer("values", values.detach().contiguous())
        self.register_buffer("bitmap", bitmap.contiguous())
        offsets = ops.row_offsets(values, bitmap, in_features)
        self.register_buffer("row_ptr", offsets, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_matrix(
        cls, matrix: Tensor, bias: Tensor | None = None, pattern: str = ""
    ) -> BitmapLinear:
        """Pack the non-zeros of a matrix (out, in)."""
        values, bitmap = ops.pack(matrix.detach())
        return cls(values, bitmap, matrix.shape[1], matrix.shape[0], bias, pattern)

    def to_matrix(self) -> Tensor:
        """The dense weight (out, in) in the dtype of the values."""
        return ops.unpack(self.values, self.bitmap, self.in_features)

    @property
    def density(self) -> float:
        """The fraction of weights stored."""
        return self.values.numel() / max(1, self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        return ops.linear(x, self.values, self.bitmap, self.row_ptr, self.bias, self.in_features)

    def extra_repr(self) -> str:
        """Shape, density and kernel."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"density={self.density:.3f}, bias={self.bias is not None}, dtype={self.values.dtype}"
        )
