"""Linear layers with 4- or 8-bit weights, sparse or dense: quantise, unpack and multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.ops import _dispatch
from gossamer.ops.bitmap import reference as bitmaps
from gossamer.ops.bitmap import row_offsets
from gossamer.ops.quantized import native, reference
from gossamer.ops.quantized.reference import BITS, quantize

__all__ = [
    "BITS",
    "QuantizedMatrix",
    "batch_kernel_name",
    "densify",
    "kernel_name",
    "linear",
    "matrix",
    "pack",
    "quantize",
    "sparsify",
    "unpack",
]

Outliers = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (out, in) of `bits`-bit integers, as `reference` describes.

    values: uint8. bitmap: uint8 (out, bytes), None where every column is kept. scales: bfloat16
    (out, groups). zeros: uint8 (out, groups) or None. outliers: int64 (out + 1) offsets, int32
    columns and float32 values of further weights, held exactly, or None. Raises FormatError
    where the parts contradict each other: kernels trust what has passed here.
    """

    values: Tensor
    bitmap: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    outliers: Outliers | None
    shape: tuple[int, int]
    bits: int
    group: int
    offsets: Tensor
    """int64: where each row, or pair of rows, begins in `values`; see `of`."""
    balanced: int = 0
    """4 or 8: every so many columns keep exactly half, which the kernels use; 0: not so."""

    @classmethod
    def of(
        cls,
        values: Tensor,
        bitmap: Tensor | None,
        scales: Tensor,
        zeros: Tensor | None,
        outliers: Outliers | None,
        shape: tuple[int, int],
        bits: int,
        group: int,
    ) -> QuantizedMatrix:
        """Checks the parts and finds the offsets."""
        if bits not in BITS or group < 64 or group & (group - 1) or group >= 1 << 31:
            raise FormatError(f"bits {bits} or group {group} is none that is served")
        groups = (shape[0], reference.groups_of(shape[1], group))
        if scales.dtype != torch.bfloat16 or scales.shape != groups:  # bounds what follows
            raise FormatError(f"scales are not bfloat16 of shape {groups}")
        if not bool(scales.isfinite().all()):
            raise FormatError("a scale is not finite")
        counts = _counts(bitmap, shape)
        offsets = reference.offsets_of(counts, bits)
        size = int(offsets[-1]) + reference.SLACK
        if values.dtype != torch.uint8 or values.shape != (size,):
            raise FormatError(f"values are not {size} bytes, which the bitmap asks for")
        if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != groups):
            raise FormatError(f"zeros are not bytes of shape {groups}")
        if zeros is not None and bool((zeros.int() >= 1 << bits).any()):
            raise FormatError(f"a zero point does not fit {bits} bits")
        if outliers is not None:
            _check_outliers(outliers, shape)
        parts = [None if t is None else t.contiguous() for t in (bitmap, zeros)]
        return cls(
            values.contiguous(), parts[0], scales.contiguous(), parts[1], outliers, shape, bits,
            group, offsets, reference.balanced_of(bitmap, shape[1]),
        )  # fmt: skip

    @property
    def kept(self) -> int:
        """How many weights are stored, outliers among them; of a dense matrix all."""
        if self.bitmap is None:
            return self.shape[0] * self.shape[1]
        shifts = torch.arange(8, dtype=torch.uint8)
        exact = 0 if self.outliers is None else self.outliers[1].numel()
        return exact + int((self.bitmap.unsqueeze(-1) >> shifts & 1).sum())

    @property
    def nonzero(self) -> int:
        """How many weights of a dense matrix are not 0, outliers among them."""
        points = reference.zero_points(self.zeros, self.shape, self.bits, self.group)
        found = reference.dense_integers(self.values, self.shape, self.bits) != points
        exact = 0 if self.outliers is None else self.outliers[1].numel()
        return exact + int(found[:, : self.shape[1]].sum())

    @property
    def nbytes(self) -> int:
        """Of what is stored: integers, bitmap, scales, zeros and outliers."""
        parts = (self.values, self.bitmap, self.scales, self.zeros, *(self.outliers or ()))
        return sum(part.nbytes for part in parts if part is not None)


def _counts(bitmap: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if bitmap is None:
        return torch.full((shape[0],), reference.padded_width(shape[1]))
    if bitmap.dtype != torch.uint8 or bitmap.dim() != 2 or bitmap.shape[0] != shape[0]:
        raise FormatError(f"bitmap is not uint8 of {shape[0]} rows")
    if bitmap.shape[1] != bitmaps.bitmap_bytes(shape[1]):
        raise FormatError(f"bitmap has {bitmap.shape[1]} bytes per row, which {shape[1]} deny")
    return row_offsets(None, bitmap, shape[1]).diff()


def _check_outliers(outliers: Outliers, shape: tuple[int, int]) -> None:
    row_ptr, cols, values = outliers
    if row_ptr.dtype != torch.int64 or row_ptr.shape != (shape[0] + 1,):
        raise FormatError(f"outlier offsets are not int64 ({shape[0] + 1},)")
    if cols.dtype != torch.int32 or values.dtype != torch.float32 or cols.shape != values.shape:
        raise FormatError("outlier columns and values are not int32 and float32 of one length")
    ends, rising = (int(row_ptr[0]), int(row_ptr[-1])), bool((row_ptr[1:] >= row_ptr[:-1]).all())
    if ends != (0, cols.numel()) or not rising:  # compared, since differences may wrap round
        raise FormatError("outlier offsets do not rise from 0 to their number")
    if cols.numel() and (int(cols.min()) < 0 or int(cols.max()) >= shape[1]):
        raise FormatError(f"an outlier's column is outside 0..{shape[1] - 1}")
    if not all(part.is_contiguous() for part in outliers):
        raise FormatError("outliers must be contiguous")


def pack(
    matrix: Tensor, bits: int, group: int = 128, symmetric: bool = True, outliers: float = 0.0
) -> QuantizedMatrix:
    """Quantise the non-zeros of a matrix (out, in), or all of it where a bitmap would not pay.

    What rounds to 0 is not kept, except in an N:M pattern that the kernels use.

    outliers: fraction of the kept weights, the largest of each row, that are held exactly beside
    the integers (SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
    Compression, 2023, chooses them by their error; here their size decides). Raises UsageError
    for a fraction outside [0, 0.5), and as `quantize`.
    """
    if not 0 <= outliers < 0.5:
        raise UsageError(f"outliers is a fraction in [0, 0.5), not {outliers}")
    matrix = matrix.detach().float()
    mask = matrix != 0
    exact = None
    if outliers > 0 and matrix.numel():
        exact, taken = _take_outliers(matrix, mask, outliers)
        matrix = matrix.masked_fill(taken, 0)
        mask = mask & ~taken
    mask = reference.complete(mask)
    sparse = float(mask.sum()) * bits + mask.numel() < mask.numel() * bits
    kept = mask if sparse else torch.ones_like(mask)
    integers, scales, zeros = quantize(matrix, kept, bits, group, symmetric)
    shape = (matrix.shape[0], matrix.shape[1])
    points = reference.zero_points(zeros, shape, bits, group)
    points[:, : shape[1]][kept] = integers[kept]
    return _packed(points, kept if sparse else None, scales, zeros, exact, shape, bits, group)


def _packed(
    integers: Tensor, mask: Tensor | None, scales: Tensor, zeros: Tensor | None,
    outliers: Outliers | None, shape: tuple[int, int], bits: int, group: int,
) -> QuantizedMatrix:  # fmt: skip
    """Of integers (out, padded in): all, or those of the mask (out, in) that are not 0."""
    if mask is None:
        counts = torch.full((shape[0],), integers.shape[1])
        values, bitmap = reference.pack(integers.flatten(), counts, bits), None
    else:
        integers = integers[:, : shape[1]]
        kept, bitmap = bitmaps.pack(integers, mask)
        if not reference.balanced_of(bitmap, shape[1]):
            points = reference.zero_points(zeros, shape, bits, group)
            mask = mask & (integers != points[:, : shape[1]])
            kept, bitmap = bitmaps.pack(integers, mask)
        values = reference.pack(kept, mask.sum(dim=1), bits)
    return QuantizedMatrix.of(values, bitmap, scales, zeros, outliers, shape, bits, group)


def densify(m: QuantizedMatrix) -> QuantizedMatrix:
    """The same weights with every column kept, others than before as exact zeros. O(out * in)."""
    if m.bitmap is None:
        return m
    if _dispatch.isa_index() < 0:
        values = reference.densify(m.values, m.bitmap, m.zeros, m.shape, m.bits, m.group)
    else:
        values = native.densify(m)
    return QuantizedMatrix.of(values, None, m.scales, m.zeros, m.outliers, m.shape, m.bits, m.group)


def sparsify(m: QuantizedMatrix) -> QuantizedMatrix:
    """The same weights with a bitmap that keeps what is not 0: undoes `densify`. O(out * in)."""
    if m.bitmap is not None:
        return m
    integers = reference.dense_integers(m.values, m.shape, m.bits)
    every = torch.ones(m.shape, dtype=torch.bool)
    return _packed(integers, every, m.scales, m.zeros, m.outliers, m.shape, m.bits, m.group)


def _take_outliers(matrix: Tensor, mask: Tensor, share: float) -> tuple[Outliers, Tensor]:
    count = max(1, round(share * float(mask.sum()) / matrix.shape[0]))
    size = matrix.abs()
    taken = torch.zeros_like(mask)
    taken.scatter_(1, size.topk(min(count, matrix.shape[1]), dim=1).indices, True)
    taken &= mask
    row_ptr = torch.nn.functional.pad(taken.sum(dim=1).cumsum(0), (1, 0))
    cols = taken.nonzero()[:, 1].to(torch.int32).contiguous()
    return (row_ptr, cols, matrix[taken].contiguous()), taken


def kernel_name(bits: int, dense: bool) -> str:
    """The kernel that serves one row of input here, such as `int4-matvec/avx512`."""
    name = _dispatch.isa()
    if name == "avx512" and not native.has_byte_products():
        name = "avx2"
    return f"int{bits}-{'dense' if dense else 'matvec'}/{name}"


def batch_kernel_name(bits: int) -> str:
    """The kernel that serves more than 8 rows here: integers, or floats unpacked piece by piece."""
    name = _dispatch.isa()
    kind = "matmul" if name == "avx512" and native.has_byte_products() else "unpack"
    return f"int{bits}-{kind}/{name}"


def unpack(m: QuantizedMatrix) -> Tensor:
    """The dense matrix (out, in) in float32. O(out * in)."""
    if _dispatch.isa_index() < 0:
        return reference.unpack(
            m.values, m.bitmap, m.scales, m.zeros, m.shape[1], m.group, m.bits, m.outliers
        )
    return native.unpack(m)


def linear(x: Tensor, m: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """x (..., in) times the quantised matrix transposed, plus bias (out,); in x's dtype.

    x is rounded to 8-bit integers, scaled per 128 inputs; a NaN or infinity then makes every result
    that its 128 inputs reach NaN. Differentiable in x (as if nothing had been
    rounded) and bias, at the memory of one dense weight. O(rows of x * kept weights).
    """
    if _dispatch.direct(x, bias):
        return _forward(x, m, bias)
    return _quantized_linear(x, bias, *_flat(m))


def _forward(x: Tensor, m: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != m.shape[1]:
        raise UsageError(f"expected inputs of width {m.shape[1]}, not {tuple(x.shape)}")
    if not (x.is_cpu and m.values.is_cpu):
        raise UsageError("the quantised kernels run on the CPU only")
    if _dispatch.isa_index() < 0:
        return reference.linear(x, unpack(m), m.outliers, bias)
    return native.linear(x, m, bias)


# What the custom operations take: torch asks for one flat list of arguments and its types.
_PARTS = (
    "Tensor values, Tensor offsets, Tensor? bitmap, Tensor scales, Tensor? zeros, "
    "Tensor? outlier_ptr, Tensor? outlier_cols, Tensor? outlier_values, "
    "int[] shape, int bits, int group, int balanced"
)


def _flat(m: QuantizedMatrix) -> tuple[Any, ...]:
    """The matrix as `_PARTS` lists it."""
    outliers = m.outliers or (None, None, None)
    return (m.values, m.offsets, m.bitmap, m.scales, m.zeros, *outliers, list(m.shape), m.bits,
            m.group, m.balanced)  # fmt: skip


def _matrix(parts: tuple[Any, ...]) -> QuantizedMatrix:
    values, offsets, bitmap, scales, zeros, row_ptr, cols, exact, shape, bits, group, balanced = (
        parts
    )
    outliers = None if row_ptr is None else (row_ptr, cols, exact)
    size = (shape[0], shape[1])
    return QuantizedMatrix(
        values, bitmap, scales, zeros, outliers, size, bits, group, offsets, balanced
    )


@torch.library.custom_op(
    "gossamer::quantized_linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {_PARTS}) -> Tensor",
)
def _quantized_linear(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return _dispatch.owned(_forward(x, _matrix(parts), bias))


@_quantized_linear.register_fake
def _(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], parts[-4][0])


@torch.library.custom_op(
    "gossamer::quantized_unpack", mutates_args=(), schema=f"({_PARTS}) -> Tensor"
)
def _unpack(*parts: Any) -> Tensor:
    return unpack(_matrix(parts))


@_unpack.register_fake
def _(*parts: Any) -> Tensor:
    return parts[0].new_empty(parts[-4], dtype=torch.float32)


def matrix(m: QuantizedMatrix) -> Tensor:
    """`unpack`, which compilers may record."""
    return _unpack(*_flat(m))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *parts = inputs
    ctx.save_for_backward(*parts[:8])
    ctx.bias, ctx.facts = bias is not None, parts[8:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad.float() @ _unpack(*ctx.saved_tensors, *ctx.facts)).to(grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.bias else None
    return grad_x, grad_bias, *[None] * 12


_quantized_linear.register_autograd(_backward, setup_context=_setup)
