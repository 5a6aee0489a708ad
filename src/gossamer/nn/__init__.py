"""Modules that hold sparse weights."""

from gossamer.nn.bitmap import BitmapLinear

__all__ = ["BitmapLinear"]
