"""Modules that hold sparse weights."""

from gossamer.nn.bitmap import BitmapLinear, prepare_batches, serves_batches
from gossamer.nn.chain import ConvChain
from gossamer.nn.conv import DepthwiseConv2d, PackedConv2d
from gossamer.nn.quantized import QuantizedLinear
from gossamer.nn.sparse import SparseConv2d, SparseLinear, to_dense

__all__ = [
    "BitmapLinear",
    "ConvChain",
    "DepthwiseConv2d",
    "PackedConv2d",
    "QuantizedLinear",
    "SparseConv2d",
    "SparseLinear",
    "prepare_batches",
    "serves_batches",
    "to_dense",
]
