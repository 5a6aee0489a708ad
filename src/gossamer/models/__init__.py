"""Adapters: where a model family keeps its blocks and which weights are pruned by default."""

from gossamer.models.blocks import find_blocks
from gossamer.models.layers import Choice, choose_weights, prunable_layers
from gossamer.models.weights import find_weights

__all__ = ["Choice", "choose_weights", "find_blocks", "find_weights", "prunable_layers"]
