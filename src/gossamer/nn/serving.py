"""Which kernels serve a packed layer here, in the words of records and tables."""

from __future__ import annotations

from gossamer.nn.packed.active import ActiveLinear
from gossamer.nn.packed.bitmap import BitmapLinear
from gossamer.nn.packed.conv import PackedConv2d
from gossamer.nn.packed.nm import NMLinear
from gossamer.nn.packed.quantized import QuantizedLinear
from gossamer.ops import _dispatch
from gossamer.ops.active import kernel_name as active_kernel_name
from gossamer.ops.bitmap import kernel_name
from gossamer.ops.bitmap.native import MATVEC_ROWS, unpacks
from gossamer.ops.nm import kernel_name as nm_kernel_name
from gossamer.ops.quantized import batch_kernel_name as quantized_batch_kernel_name
from gossamer.ops.quantized import kernel_name as quantized_kernel_name

Packed = ActiveLinear | BitmapLinear | NMLinear | QuantizedLinear | PackedConv2d


def serves(layer: Packed) -> tuple[str, str]:
    """What serves batch sizes up to 8, and what serves more; of a convolution twice the same.

    Names are a kernel and its instructions, such as `bitmap-matvec/avx512`.
    """
    if isinstance(layer, ActiveLinear):
        return active_kernel_name(), "dense columns"
    if isinstance(layer, PackedConv2d):
        return layer.kernel, layer.kernel
    if isinstance(layer, QuantizedLinear):
        matvec = quantized_kernel_name(layer.bits, dense=layer.bitmap is None)
        return matvec, quantized_batch_kernel_name(layer.bits)
    if isinstance(layer, NMLinear):
        return nm_kernel_name(), layer.batch_kernel or f"nm-unpack/{_dispatch.isa()}"
    few = kernel_name(columns=layer.columns is not None)
    return few, layer.batch_kernel or _unprepared(layer)


def _unprepared(layer: BitmapLinear) -> str:
    """What `ops.bitmap` does with batches by itself."""
    unpacked, straight = f"bitmap-unpack/{_dispatch.isa()}", kernel_name(MATVEC_ROWS + 1)
    if _dispatch.isa_index() < 0:
        return straight
    few, many = (
        unpacks(rows, layer.density, layer.unpack_from) for rows in (MATVEC_ROWS + 1, 1 << 30)
    )
    if few == many:
        return unpacked if few else straight
    return f"{straight}, {unpacked} from {layer.unpack_from} rows on"
