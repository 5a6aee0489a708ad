"""A linear layer whose weight is stored as kept values and a bitmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import PatternError, UsageError
from gossamer.core.pattern import Block, parse_pattern
from gossamer.nn.packed.base import PackedLayer, affine, frozen
from gossamer.ops import bitmap as ops
from gossamer.ops import blocks, prepared, sell
from gossamer.ops._dispatch import direct
from gossamer.ops.blocks import Blocks
from gossamer.ops.prepared import BatchForm, by_form, suits, version


class BitmapLinear(PackedLayer):
    """y = x W^T + b with W (out, in) packed; takes the place of a Linear of the same shape.

    values: (nnz,), float32 or bfloat16. bitmap: uint8 (out, 8 * ceil(in / 64)). Moving the module
    to another floating dtype converts the values; other devices than the CPU are refused when
    called. `PackedLayer` says what it shares with the layer replaced. Raises FormatError when the
    parts contradict each other.

    `prepare_large_batches` adds a second copy of the weights, never saved, in the form that serves more
    than 8 rows fastest: blocks for a block pattern whose blocks are whole, else groups of
    columns. Without it such batches are unpacked piece by piece for a dense product, or multiplied
    row by row: from `unpack_from` rows on, or where that is None from 30% density on.
    `prepare_columns` holds the column of every kept weight too, which serves up to 8 rows.
    `rows_decided` and `large_batches_decided` say why `compress` or `load` prepared these forms or not;
    empty: not asked.
    """

    values: Tensor
    bitmap: Tensor
    row_ptr: Tensor
    columns: Tensor | None

    def __init__(
        self,
        values: Tensor,
        bitmap: Tensor,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        pattern: str = "",
        requested_density: float | None = None,
    ) -> None:
        super().__init__()
        if values.dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"packed values are float32 or bfloat16, not {values.dtype}")
        if bitmap.dim() != 2 or bitmap.shape[0] != out_features:
            raise UsageError(f"bitmap has shape {tuple(bitmap.shape)}, not {out_features} rows")
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.requested_density = pattern, requested_density
        self.register_buffer("values", values.detach().contiguous())
        self.register_buffer("bitmap", bitmap.contiguous())
        offsets = ops.row_offsets(values, bitmap, in_features)
        self.register_buffer("row_ptr", offsets, persistent=False)
        self.register_buffer("columns", None, persistent=False)
        self.rows_decided = ""
        self._form: tuple[int, BatchForm] | None = None
        self.large_batches_decided = ""
        self.unpack_from: int | None = None
        self.bias = frozen(bias)

    @classmethod
    def from_matrix(
        cls, matrix: Tensor, bias: Tensor | None = None, pattern: str = ""
    ) -> BitmapLinear:
        """Pack the non-zeros of a matrix (out, in)."""
        values, bitmap = ops.pack(matrix.detach())
        return cls(values, bitmap, matrix.shape[1], matrix.shape[0], bias, pattern)

    def to_matrix(self) -> Tensor:
        """The dense weight (out, in) in the dtype of the values."""
        return ops.matrix(self.values, self.bitmap, self.row_ptr, self.in_features)

    def like(self) -> Tensor:
        """The values."""
        return self.values

    @property
    def density(self) -> float:
        """The fraction of weights stored."""
        return self.values.numel() / max(1, self.in_features * self.out_features)

    def prepare_columns(self) -> int:
        """Hold the column of every kept weight, never saved; returns the bytes. O(out * in / 64).

        Batch sizes up to 8 then take time by the kept weights: less where they are few.
        """
        self.columns = ops.columns_of(self.bitmap, self.row_ptr, self.in_features)
        return self.columns.nbytes

    def prepare_large_batches(self) -> int:
        """Build the form for batches; returns its bytes. O(out * in / 64 + nnz)."""
        form = self.make_form()
        self._form = (version(self.values), form)
        return form.nbytes

    def make_form(self) -> BatchForm:
        """The form for batches."""
        if (block := _block(self.pattern)) is not None:
            mask = ops.unpack_mask(self.bitmap, self.in_features)
            form = blocks.build(self.to_matrix(), mask, block)
            if form is not None:
                return form
        return sell.build(self.values, self.bitmap, self.row_ptr, self.in_features)

    @property
    def batch_kernel(self) -> str | None:
        """The kernel that serves batches, where a form for it is prepared."""
        if self._form is None:
            return None
        return (blocks if isinstance(self._form[1], Blocks) else sell).kernel_name()

    def product(self, x: Tensor) -> Tensor:
        """By the form for batches where it suits x, else by the bitmap or the columns."""
        if self._form is not None and not direct(x, self.bias):
            if not torch.compiler.is_compiling():
                self.refresh()
            packed = [self.values, self.bitmap, self.row_ptr]
            packed += [] if self.columns is None else [self.columns]
            facts = [self.in_features, -1 if self.unpack_from is None else self.unpack_from]
            return prepared.linear(x, self._form[1], self._form[0], packed, facts, self.bias)
        form = self.refresh() if self._form is not None and suits(x, self.in_features) else None
        if form is not None:
            return by_form(x, form, self.bias)
        parts = (self.values, self.bitmap, self.row_ptr, self.bias, self.in_features)
        return ops.linear(x, *parts, self.unpack_from, self.columns)

    def dense_product(self, x: Tensor) -> Tensor:
        """By the unpacked matrix."""
        return affine(x, self.to_matrix(), self.bias)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        values, bitmap = state.get(prefix + "values"), state.get(prefix + "bitmap")
        if getattr(values, "shape", None) == self.values.shape and bitmap is not None:
            # other zeros, other offsets: checked before anything is written
            self.row_ptr = ops.row_offsets(values, bitmap, self.in_features)
        super()._load_from_state_dict(state, prefix, *args)
        if self.columns is not None:
            self.prepare_columns()
        self.refresh()

    def extra_repr(self) -> str:
        """Shape, density and kernel."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"density={self.density:.3f}, bias={self.bias is not None}, dtype={self.values.dtype}, "
            f"columns={self.columns is not None}, batches={self.batch_kernel}"
        )


def _block(pattern: str) -> tuple[int, int] | None:
    """Rows and columns of a block pattern, None for another or an unknown one."""
    try:
        parsed = parse_pattern(pattern)
    except PatternError:
        return None
    return (parsed.rows, parsed.cols) if isinstance(parsed, Block) else None


def serves_large_batches(model: nn.Module, wanted: bool | None = None) -> bool:
    """Whether its layers should hold the form for batches: as wanted, else unless it generates.

    A model that generates text multiplies mostly one row at a time, and memory decides its speed.
    """
    if wanted is not None:
        return wanted
    asked = getattr(model, "can_generate", None)  # Hugging Face models answer
    return not (callable(asked) and asked())
