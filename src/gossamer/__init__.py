"""Gossamer makes neural networks sparse, and makes sparse networks pay."""

__version__ = "0.1.0"
