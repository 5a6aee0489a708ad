"""Modules that hold sparse weights."""

from gossamer.nn.bitmap import BitmapLinear, prepare_batches, serves_batches
from gossamer.nn.quantized import QuantizedLinear

__all__ = ["BitmapLinear", "QuantizedLinear", "prepare_batches", "serves_batches"]
