"""Attention: which pairs of queries and keys are computed, and which keys a cache keeps."""

from gossamer.methods.attention.anchor import AnchorAttention
from gossamer.methods.attention.block_sparse import BlockSparse
from gossamer.methods.attention.dma import DMA
from gossamer.methods.attention.drsformer import DRSformer
from gossamer.methods.attention.flex_prefill import FlexPrefill
from gossamer.methods.attention.moa import MoA
from gossamer.methods.attention.routing import RoutingTransformer
from gossamer.methods.attention.s2 import S2Attention
from gossamer.methods.attention.seer import SeerAttention
from gossamer.methods.attention.streaming import StreamingLLM
from gossamer.methods.attention.vertical_slash import VerticalSlash

__all__ = [
    "DMA",
    "AnchorAttention",
    "BlockSparse",
    "DRSformer",
    "FlexPrefill",
    "MoA",
    "RoutingTransformer",
    "S2Attention",
    "SeerAttention",
    "StreamingLLM",
    "VerticalSlash",
]
