"""Modules that hold sparse weights."""

from gossamer.nn.bitmap import BitmapLinear, prepare_batches, serves_batches

__all__ = ["BitmapLinear", "prepare_batches", "serves_batches"]
