"""A linear layer whose weight keeps N of every M columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.core.errors import PatternError, UsageError
from gossamer.core.pattern import NM, parse_pattern
from gossamer.nn.packed.base import PackedLayer, affine, frozen
from gossamer.nn.packed.bitmap import BitmapLinear
from gossamer.ops import bitmap, prepared, sell
from gossamer.ops import nm as ops
from gossamer.ops._dispatch import direct
from gossamer.ops.nm import Layout
from gossamer.ops.prepared import by_form, suits, version
from gossamer.ops.sell import Sell


class NMLinear(PackedLayer):
    """y = x W^T + b with W (out, in) packed N:M; takes the place of a Linear of the same shape.

    values (out, stored) float32 or bfloat16 and codes uint8 (out, bytes), as in `ops.nm`. Moving
    the module to another floating dtype converts the values; other devices than the CPU are
    refused when called. Raises FormatError when the parts contradict each other, UsageError for a
    pattern that is not N:M with M in 2, 4, 8, 16, 32.

    `prepare_large_batches` adds a second copy of the weights, never saved, that serves more than 8 rows
    of input fastest. Without it such batches are unpacked piece by piece. `large_batches_decided` says
    why a model's layer has it or not.
    """

    values: Tensor
    codes: Tensor

    def __init__(
        self,
        values: Tensor,
        codes: Tensor,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        pattern: str = "2:4",
        requested_density: float | None = None,
    ) -> None:
        super().__init__()
        if values.dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"stored values are float32 or bfloat16, not {values.dtype}")
        self.layout = _layout(pattern, in_features)
        if values.dim() != 2 or values.shape[0] != out_features:
            raise UsageError(f"values have shape {tuple(values.shape)}, not {out_features} rows")
        ops.check(values, codes, self.layout)
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.requested_density = pattern, requested_density
        self.register_buffer("values", values.detach().contiguous())
        self.register_buffer("codes", codes.contiguous())
        self._form: tuple[int, Sell] | None = None
        self.large_batches_decided = ""
        self.bias = frozen(bias)

    @classmethod
    def from_matrix(
        cls, matrix: Tensor, bias: Tensor | None = None, pattern: str = "2:4"
    ) -> NMLinear:
        """Pack a matrix (out, in) of which no group has more non-zeros than the pattern keeps."""
        layout = _layout(pattern, matrix.shape[1])
        values, codes = ops.pack(matrix.detach(), layout.keep, layout.group)
        return cls(values, codes, matrix.shape[1], matrix.shape[0], bias, pattern)

    def to_matrix(self) -> Tensor:
        """The dense weight (out, in) in the dtype of the values."""
        return ops.matrix(self.values, self.codes, self.layout)

    def like(self) -> Tensor:
        """The values."""
        return self.values

    @property
    def nbytes(self) -> int:
        """Bytes of values and codes."""
        return self.values.nbytes + self.codes.nbytes

    @property
    def kept(self) -> int:
        """How many stored weights are not zero."""
        return int(torch.count_nonzero(self.values))

    @property
    def density(self) -> float:
        """The fraction of weights that are stored and not zero."""
        return self.kept / max(1, self.in_features * self.out_features)

    def prepare_large_batches(self) -> int:
        """Build the form for batches; returns its bytes. O(out * in)."""
        form = self.make_form()
        self._form = (version(self.values), form)
        return form.nbytes

    def make_form(self) -> Sell:
        """The form for batches."""
        values, bits = bitmap.pack(self.to_matrix())
        offsets = bitmap.row_offsets(values, bits, self.in_features)
        return sell.build(values, bits, offsets, self.in_features)

    @property
    def batch_kernel(self) -> str | None:
        """The kernel that serves batches, where a form for it is prepared."""
        return None if self._form is None else sell.kernel_name()

    def product(self, x: Tensor) -> Tensor:
        """By the form for batches where it suits x, else by the stored values."""
        if self._form is not None and not direct(x, self.bias):
            if not torch.compiler.is_compiling():
                self.refresh()
            packed, layout = [self.values, self.codes], self.layout
            facts = [layout.keep, layout.group, layout.cols]
            return prepared.linear(x, self._form[1], self._form[0], packed, facts, self.bias)
        form = self.refresh() if self._form is not None and suits(x, self.in_features) else None
        if form is not None:
            return by_form(x, form, self.bias)
        return ops.linear(x, self.values, self.codes, self.bias, self.layout)

    def dense_product(self, x: Tensor) -> Tensor:
        """By the unpacked matrix."""
        return affine(x, self.to_matrix(), self.bias)

    def extra_repr(self) -> str:
        """Shape, pattern and dtype."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pattern={self.pattern}, bias={self.bias is not None}, dtype={self.values.dtype}, "
            f"batches={self.batch_kernel}"
        )


def pays_as_nm(matrix: Tensor, pattern: str) -> bool:
    """Whether `pattern` is N:M with a kernel, the matrix (out, in) keeps it, and it takes fewer
    bytes so than with a bitmap, or as many below half density. O(out * in).

    At equal bytes the bitmap's kernel is as fast at 2:4 and slower below, where it is bound by its
    instructions, one bit per position, and not by bytes.
    """
    try:
        layout = _layout(pattern, matrix.shape[1])
    except UsageError:
        return False
    rows, width = matrix.shape[0], matrix.element_size()
    as_bitmap = rows * bitmap.bitmap_bytes(matrix.shape[1])
    as_bitmap += int(torch.count_nonzero(matrix)) * width
    fits = ops.fits(matrix, layout.keep, layout.group)
    spared = as_bitmap - layout.nbytes(rows, width)
    return fits and (spared > 0 or (spared == 0 and 2 * layout.keep < layout.group))


def _layout(pattern: str, in_features: int) -> Layout:
    try:
        parsed = parse_pattern(pattern)
    except PatternError as error:
        raise UsageError(str(error)) from None
    if not isinstance(parsed, NM):
        raise UsageError(f"an N:M layer has a pattern such as 2:4, not {pattern!r}")
    return Layout(parsed.keep, parsed.group, in_features)


def prepare_large_batches(model: nn.Module) -> int:
    """Build the form for batches in every packed layer; returns the bytes it takes."""
    packed = [module for module in model.modules() if isinstance(module, BitmapLinear | NMLinear)]
    return sum(module.prepare_large_batches() for module in packed)
