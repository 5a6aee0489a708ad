"""Every public name of `gossamer`."""

from gossamer.api import compare, prune
from gossamer.api_activations import (
    calibrate_activations,
    generate_corrected,
    load_activations,
    sparsify_activations,
)
from gossamer.api_attention import (
    attend,
    attention_cache,
    calibrate_attention,
    calibrate_denoising,
    sparse_attention,
    sparse_denoising,
)
from gossamer.attention_comparison import AttentionComparison, compare_attention
from gossamer.compression import CompressionReport, measure_compression
from gossamer.core.allocation import (
    ER,
    ERK,
    OWL,
    BlockInfluence,
    ERKPlus,
    Uniform,
    UniformPlus,
)
from gossamer.core.budget import BatchTopK, Fraction, Threshold, TopK, TopP
from gossamer.core.card import Card
from gossamer.core.coupling import Coupled
from gossamer.core.denoising import Attended, DenoisingStep, TokenGrid
from gossamer.core.errors import (
    FormatError,
    GossamerError,
    MissingExtra,
    NonFiniteError,
    PatternError,
    UsageError,
)
from gossamer.core.pattern import NM, Block, Channel, Unstructured, format_pattern, parse_pattern
from gossamer.core.result import CompressResult, Coverage, LayerRecord, LeftOut, PruneResult
from gossamer.core.support import Support
from gossamer.core.text import text_batches
from gossamer.engine.inputs.activations.correct import CorrectedResult
from gossamer.engine.inputs.activations.layer_plan import LayerPlan
from gossamer.engine.inputs.activations.neurons import NeuronRun
from gossamer.engine.inputs.activations.plan import ActivationPlan
from gossamer.engine.inputs.activations.result import ActivationResult, LayerActivations
from gossamer.engine.inputs.activations.run import ActivationRun
from gossamer.engine.inputs.adapters import attention_adapters
from gossamer.engine.inputs.attention import AttentionRun
from gossamer.engine.inputs.denoise_tally import DenoisingResult
from gossamer.engine.inputs.denoising import DenoisingRun
from gossamer.engine.inputs.segments import Segment, encode_segment, join_segments
from gossamer.engine.inputs.tally import AttentionResult, LayerAttention
from gossamer.engine.measure.problems import ImageProblem, TextProblem
from gossamer.engine.prune.replace import ReplaceLayersResult, fold_layers, replace_layers
from gossamer.engine.prune.structure import (
    RemoveChannelsResult,
    coupled_channels,
    fixed_channels,
    remove_channels,
)
from gossamer.engine.serve.compress import compress
from gossamer.engine.serve.generate import generate
from gossamer.engine.serve.measure_latency import calibrate_latency
from gossamer.engine.serve.unpack import unpack
from gossamer.engine.train.compressed import TrueSparseRun, sparse_layers, true_sparse_training
from gossamer.engine.train.distil import DistilResult, distil_steps
from gossamer.engine.train.estimate import EstimatedGradients
from gossamer.engine.train.learned import LearnedRun
from gossamer.engine.train.masked import sparse_training
from gossamer.engine.train.rounds import RoundPart, RoundsResult, train_rounds
from gossamer.engine.train.run import SparseRun
from gossamer.io import export, load, push, save
from gossamer.methods import cards, find
from gossamer.nn.kernel_choice.latency import LatencyModel
from gossamer.nn.semi_structured import from_semi_structured, to_semi_structured
from gossamer.ops.allocation import LAMP, Global
from gossamer.ops.select import keep, select, select_global
from gossamer.report.comparison import Comparison
from gossamer.training import (
    TrainingComparison,
    TrainingReport,
    compare_training,
    measure_training,
)

__all__ = [
    "ER",
    "ERK",
    "LAMP",
    "NM",
    "OWL",
    "ActivationPlan",
    "ActivationResult",
    "ActivationRun",
    "Attended",
    "AttentionComparison",
    "AttentionResult",
    "AttentionRun",
    "BatchTopK",
    "Block",
    "BlockInfluence",
    "Card",
    "Channel",
    "Comparison",
    "CompressResult",
    "CompressionReport",
    "CorrectedResult",
    "Coupled",
    "Coverage",
    "DenoisingResult",
    "DenoisingRun",
    "DenoisingStep",
    "DistilResult",
    "ERKPlus",
    "EstimatedGradients",
    "FormatError",
    "Fraction",
    "Global",
    "GossamerError",
    "ImageProblem",
    "LatencyModel",
    "LayerActivations",
    "LayerAttention",
    "LayerPlan",
    "LayerRecord",
    "LearnedRun",
    "LeftOut",
    "MissingExtra",
    "NeuronRun",
    "NonFiniteError",
    "PatternError",
    "PruneResult",
    "RemoveChannelsResult",
    "ReplaceLayersResult",
    "RoundPart",
    "RoundsResult",
    "Segment",
    "SparseRun",
    "Support",
    "TextProblem",
    "Threshold",
    "TokenGrid",
    "TopK",
    "TopP",
    "TrainingComparison",
    "TrainingReport",
    "TrueSparseRun",
    "Uniform",
    "UniformPlus",
    "Unstructured",
    "UsageError",
    "attend",
    "attention_adapters",
    "attention_cache",
    "calibrate_activations",
    "calibrate_attention",
    "calibrate_denoising",
    "calibrate_latency",
    "cards",
    "compare",
    "compare_attention",
    "compare_training",
    "compress",
    "coupled_channels",
    "distil_steps",
    "encode_segment",
    "export",
    "find",
    "fixed_channels",
    "fold_layers",
    "format_pattern",
    "from_semi_structured",
    "generate",
    "generate_corrected",
    "join_segments",
    "keep",
    "load",
    "load_activations",
    "measure_compression",
    "measure_training",
    "parse_pattern",
    "prune",
    "push",
    "remove_channels",
    "replace_layers",
    "save",
    "select",
    "select_global",
    "sparse_attention",
    "sparse_denoising",
    "sparse_layers",
    "sparse_training",
    "sparsify_activations",
    "text_batches",
    "to_semi_structured",
    "train_rounds",
    "true_sparse_training",
    "unpack",
]
