"""Modules that hold sparse weights."""

from gossamer.nn.bitmap import BitmapLinear, prepare_batches, serves_batches
from gossamer.nn.conv import DepthwiseConv2d, PointwiseConv2d

__all__ = [
    "BitmapLinear",
    "DepthwiseConv2d",
    "PointwiseConv2d",
    "prepare_batches",
    "serves_batches",
]
