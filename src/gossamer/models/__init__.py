"""Adapters: where a model family keeps its blocks and which layers are pruned by default."""

from gossamer.models.blocks import find_blocks
from gossamer.models.layers import prunable_layers

__all__ = ["find_blocks", "prunable_layers"]
