"""A linear layer whose weight is stored as 4- or 8-bit integers, sparse or dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.nn.packed.base import PackedLayer, affine, frozen
from gossamer.ops import quantized as ops
from gossamer.ops.quantized import QuantizedMatrix


class QuantizedLinear(PackedLayer):
    """y = x W^T + b with W (out, in) quantised; takes the place of a Linear of the same shape.

    Buffers as in `ops.quantized.QuantizedMatrix`; what a layer does not have is None. Moving the
    module to another floating dtype changes the bias alone, and the dtype that `weight` is said to
    have: dtype, by default the bias's, else float32. Other devices than the CPU are refused
    when called. `densify` holds a sparse matrix dense in memory; `form_decided` says why `compress` or
    `load` did so or not, empty: not asked.
    """

    values: Tensor
    scales: Tensor
    bitmap: Tensor | None
    typed: Tensor

    def __init__(
        self,
        matrix: QuantizedMatrix,
        bias: Tensor | None = None,
        pattern: str = "",
        requested_density: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.bits, self.group, self._balanced = matrix.bits, matrix.group, matrix.balanced
        self.pattern, self.requested_density = pattern, requested_density
        self._densified = False
        self.form_decided = ""
        row_ptr, cols, exact = matrix.outliers or (None, None, None)
        self.register_buffer("values", matrix.values)
        self.register_buffer("bitmap", matrix.bitmap)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("zeros", matrix.zeros)
        self.register_buffer("outlier_ptr", row_ptr)
        self.register_buffer("outlier_cols", cols)
        self.register_buffer("outlier_values", exact)
        self.register_buffer("offsets", matrix.offsets, persistent=False)
        kind = dtype or (torch.float32 if bias is None else bias.dtype)
        self.register_buffer("typed", torch.empty(0, dtype=kind), persistent=False)
        self.bias = frozen(bias)

    @classmethod
    def from_matrix(
        cls,
        matrix: Tensor,
        bias: Tensor | None = None,
        pattern: str = "",
        *,
        bits: int = 4,
        group: int = 128,
        symmetric: bool = True,
        outliers: float = 0.0,
    ) -> QuantizedLinear:
        """Quantise a matrix (out, in); its zeros stay exact zeros."""
        packed = ops.pack(matrix, bits, group, symmetric, outliers)
        return cls(packed, bias, pattern, dtype=matrix.dtype)

    @property
    def matrix(self) -> QuantizedMatrix:
        """The stored parts."""
        parts: Any = self._buffers
        shape = (self.out_features, self.in_features)
        return QuantizedMatrix(
            parts["values"], parts["bitmap"], parts["scales"], parts["zeros"], _outliers(parts),
            shape, self.bits, self.group, parts["offsets"], self._balanced,
        )  # fmt: skip

    @property
    def stored(self) -> QuantizedMatrix:
        """What files hold: `matrix`, or of a densified layer the sparse one. O(out * in)."""
        return ops.sparsify(self.matrix) if self._densified else self.matrix

    def densify(self) -> None:
        """Hold dense integers in memory, which may be faster; files and state dicts stay sparse."""
        if self.bitmap is not None:
            self._hold(ops.densify(self.matrix))
            self._densified = True

    def sparsify(self) -> None:
        """Undo `densify`: hold the kept integers and their bitmap again, which take less memory."""
        if self._densified:
            self._hold(self.stored)
            self._densified = False

    def _hold(self, matrix: QuantizedMatrix) -> None:
        self.values, self.bitmap, self.offsets = matrix.values, matrix.bitmap, matrix.offsets
        self._balanced = matrix.balanced

    def to_matrix(self) -> Tensor:
        """The dense weight (out, in) in float32."""
        return ops.matrix(self.matrix)

    def like(self) -> Tensor:
        """An empty tensor of the dtype that the weight had."""
        return self.typed

    @property
    def has_kernel(self) -> bool:
        """Integers stay as they are, whatever the model's dtype."""
        return True

    @property
    def kept(self) -> int:
        """How many weights files hold, outliers among them."""
        return self.matrix.nonzero if self._densified else self.matrix.kept

    @property
    def sparse(self) -> bool:
        """Whether files hold a bitmap."""
        return self._densified or self.bitmap is not None

    @property
    def density(self) -> float:
        """The fraction of weights stored."""
        return self.kept / max(1, self.in_features * self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """By the integers."""
        return ops.linear(x, self.matrix, self.bias)

    def dense_product(self, x: Tensor) -> Tensor:
        """By the unpacked matrix; x is not rounded."""
        return affine(x, self.to_matrix(), self.bias)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._densified:
            stored = self.stored
            destination[prefix + "values"] = stored.values
            destination[prefix + "bitmap"] = stored.bitmap

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.sparsify()
        skipped = self._non_persistent_buffers_set
        old = {
            name: b for name, b in self._buffers.items() if b is not None and name not in skipped
        }
        new = {name: state.get(prefix + name) for name in old}
        if all(getattr(new[name], "shape", None) == old[name].shape for name in old):
            # other zeros, other offsets: checked before anything is written
            parts: Any = new
            matrix = QuantizedMatrix.of(
                parts["values"], parts.get("bitmap"), parts["scales"], parts.get("zeros"),
                _outliers(parts), (self.out_features, self.in_features), self.bits, self.group,
            )  # fmt: skip
            self.offsets, self._balanced = matrix.offsets, matrix.balanced
        super()._load_from_state_dict(state, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        kept = {n: b for n, b in self._buffers.items() if b is not None and n != "typed"}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():  # float() and its kin are not for what is stored
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Shape, width and group."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group={self.group}, sparse={self.sparse}, densified={self._densified}, "
            f"bias={self.bias is not None}"
        )


def _outliers(parts: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    if parts.get("outlier_ptr") is None:
        return None
    return parts["outlier_ptr"], parts["outlier_cols"], parts["outlier_values"]
