"""Modules that hold sparse weights."""

from gossamer.nn.chain import ConvChain
from gossamer.nn.dense import to_dense
from gossamer.nn.packed.active import ActiveLinear
from gossamer.nn.packed.bitmap import BitmapLinear, serves_large_batches
from gossamer.nn.packed.conv import DepthwiseConv2d, PackedConv2d
from gossamer.nn.packed.nm import NMLinear, prepare_large_batches
from gossamer.nn.packed.quantized import QuantizedLinear
from gossamer.nn.semi_structured import from_semi_structured, to_semi_structured
from gossamer.nn.sparse import SparseConv2d, SparseLinear

__all__ = [
    "ActiveLinear",
    "BitmapLinear",
    "ConvChain",
    "DepthwiseConv2d",
    "NMLinear",
    "PackedConv2d",
    "QuantizedLinear",
    "SparseConv2d",
    "SparseLinear",
    "from_semi_structured",
    "prepare_large_batches",
    "serves_large_batches",
    "to_dense",
    "to_semi_structured",
]
