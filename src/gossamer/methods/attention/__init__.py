"""Attention: which pairs of queries and keys are computed, and which keys a cache keeps."""

from gossamer.methods.attention.ada_snapkv import AdaSnapKV
from gossamer.methods.attention.anchor import AnchorAttention
from gossamer.methods.attention.block_sparse import BlockSparse
from gossamer.methods.attention.double_sparsity import DoubleSparsity
from gossamer.methods.attention.flex_prefill import FlexPrefill
from gossamer.methods.attention.mustafar import Mustafar
from gossamer.methods.attention.quest import Quest
from gossamer.methods.attention.seer import SeerAttention
from gossamer.methods.attention.snapkv import SnapKV
from gossamer.methods.attention.streaming import StreamingLLM
from gossamer.methods.attention.vertical_slash import VerticalSlash

__all__ = [
    "AdaSnapKV",
    "AnchorAttention",
    "BlockSparse",
    "DoubleSparsity",
    "FlexPrefill",
    "Mustafar",
    "Quest",
    "SeerAttention",
    "SnapKV",
    "StreamingLLM",
    "VerticalSlash",
]
