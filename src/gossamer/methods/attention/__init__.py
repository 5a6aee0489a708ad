"""Attention: which pairs of queries and keys are computed, and which keys a cache keeps."""

from gossamer.methods.attention.ada_snapkv import AdaSnapKV
from gossamer.methods.attention.adaspa import AdaSpa
from gossamer.methods.attention.anchor import AnchorAttention
from gossamer.methods.attention.biformer import BiFormer
from gossamer.methods.attention.blade import VideoBLADE
from gossamer.methods.attention.block_sparse import BlockSparse
from gossamer.methods.attention.dma import DMA
from gossamer.methods.attention.double_sparsity import DoubleSparsity
from gossamer.methods.attention.drsformer import DRSformer
from gossamer.methods.attention.flex_prefill import FlexPrefill
from gossamer.methods.attention.gin import SparseGIN
from gossamer.methods.attention.graph_kv import GraphKV
from gossamer.methods.attention.gtsp import GTSP
from gossamer.methods.attention.light_forcing import LightForcing
from gossamer.methods.attention.mesh_transformer import MeshTransformer
from gossamer.methods.attention.moa import MoA
from gossamer.methods.attention.mustafar import Mustafar
from gossamer.methods.attention.paraformer import Paraformer
from gossamer.methods.attention.psa import PSA
from gossamer.methods.attention.quest import Quest
from gossamer.methods.attention.rettention import Rettention
from gossamer.methods.attention.routing import RoutingTransformer
from gossamer.methods.attention.s2 import S2Attention
from gossamer.methods.attention.seer import SeerAttention
from gossamer.methods.attention.snapkv import SnapKV
from gossamer.methods.attention.sparse_graph_tracker import SparseGraphTracker
from gossamer.methods.attention.sparse_vdit import SparseVDiT
from gossamer.methods.attention.sparsed import SparseD
from gossamer.methods.attention.sparsifiner import Sparsifiner
from gossamer.methods.attention.streaming import StreamingLLM
from gossamer.methods.attention.svg2 import SVG2
from gossamer.methods.attention.vertical_slash import VerticalSlash

__all__ = [
    "DMA",
    "GTSP",
    "PSA",
    "SVG2",
    "AdaSnapKV",
    "AdaSpa",
    "AnchorAttention",
    "BiFormer",
    "BlockSparse",
    "DRSformer",
    "DoubleSparsity",
    "FlexPrefill",
    "GraphKV",
    "LightForcing",
    "MeshTransformer",
    "MoA",
    "Mustafar",
    "Paraformer",
    "Quest",
    "Rettention",
    "RoutingTransformer",
    "S2Attention",
    "SeerAttention",
    "SnapKV",
    "SparseD",
    "SparseGIN",
    "SparseGraphTracker",
    "SparseVDiT",
    "Sparsifiner",
    "StreamingLLM",
    "VerticalSlash",
    "VideoBLADE",
]
