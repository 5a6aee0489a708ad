"""Weights: scores, solvers, topology, penalties and recipes, after or during training."""

from gossamer.methods.weights.deepzero import DeepZero
from gossamer.methods.weights.dsnot import DSnoT
from gossamer.methods.weights.fixed_masks import FixedMasks
from gossamer.methods.weights.gmp import GMP
from gossamer.methods.weights.granet import GraNet
from gossamer.methods.weights.grasp import GraSP
from gossamer.methods.weights.imp import IMP
from gossamer.methods.weights.issp import ISSP
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.methods.weights.maskllm import MaskLLM
from gossamer.methods.weights.masksparsity import MaskSparsity
from gossamer.methods.weights.mdgf import MdGf
from gossamer.methods.weights.monarch import Monarch
from gossamer.methods.weights.random import Random
from gossamer.methods.weights.rigl import RigL
from gossamer.methods.weights.scl import SCL
from gossamer.methods.weights.sdgf import SdGf
from gossamer.methods.weights.set import SET
from gossamer.methods.weights.sltrain import SLTrain
from gossamer.methods.weights.snip import SNIP
from gossamer.methods.weights.soups import SparseModelSoups
from gossamer.methods.weights.sparsegpt import SparseGPT
from gossamer.methods.weights.srste import SRSTE
from gossamer.methods.weights.static_random import StaticRandom
from gossamer.methods.weights.synflow import SynFlow
from gossamer.methods.weights.wanda import Wanda
from gossamer.methods.weights.wgsef import WGSEF
from gossamer.methods.weights.widths import Widths

__all__ = [
    "GMP",
    "IMP",
    "ISSP",
    "SCL",
    "SET",
    "SNIP",
    "SRSTE",
    "WGSEF",
    "DSnoT",
    "DeepZero",
    "FixedMasks",
    "GraNet",
    "GraSP",
    "Magnitude",
    "MaskLLM",
    "MaskSparsity",
    "MdGf",
    "Monarch",
    "Random",
    "RigL",
    "SLTrain",
    "SdGf",
    "SparseGPT",
    "SparseModelSoups",
    "StaticRandom",
    "SynFlow",
    "Wanda",
    "Widths",
]
