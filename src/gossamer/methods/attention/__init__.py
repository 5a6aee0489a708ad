"""Attention: which pairs of queries and keys are computed, and which keys a cache keeps."""

from gossamer.methods.attention.anchor import AnchorAttention
from gossamer.methods.attention.biformer import BiFormer
from gossamer.methods.attention.block_sparse import BlockSparse
from gossamer.methods.attention.drsformer import DRSformer
from gossamer.methods.attention.flex_prefill import FlexPrefill
from gossamer.methods.attention.gtsp import GTSP
from gossamer.methods.attention.mesh_transformer import MeshTransformer
from gossamer.methods.attention.paraformer import Paraformer
from gossamer.methods.attention.seer import SeerAttention
from gossamer.methods.attention.sparse_graph_tracker import SparseGraphTracker
from gossamer.methods.attention.sparsifiner import Sparsifiner
from gossamer.methods.attention.streaming import StreamingLLM
from gossamer.methods.attention.vertical_slash import VerticalSlash

__all__ = [
    "GTSP",
    "AnchorAttention",
    "BiFormer",
    "BlockSparse",
    "DRSformer",
    "FlexPrefill",
    "MeshTransformer",
    "Paraformer",
    "SeerAttention",
    "SparseGraphTracker",
    "Sparsifiner",
    "StreamingLLM",
    "VerticalSlash",
]
