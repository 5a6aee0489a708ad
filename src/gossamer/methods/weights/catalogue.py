"""The methods that make weights sparse, in the order in which they are listed.

A new method is its import and its line in the tuple: the public name, the registry, the command
line, the docs and the conformance tests follow from it.
"""

from gossamer.methods.weights.regularizers.masksparsity import MaskSparsity as MaskSparsity
from gossamer.methods.weights.regularizers.wgsef import WGSEF as WGSEF
from gossamer.methods.weights.scores.magnitude import Magnitude as Magnitude
from gossamer.methods.weights.scores.random import Random as Random
from gossamer.methods.weights.scores.wanda import Wanda as Wanda
from gossamer.methods.weights.solvers.sparsegpt import SparseGPT as SparseGPT
from gossamer.methods.weights.training.gmp import GMP as GMP
from gossamer.methods.weights.training.granet import GraNet as GraNet
from gossamer.methods.weights.training.imp import IMP as IMP
from gossamer.methods.weights.training.issp import ISSP as ISSP
from gossamer.methods.weights.training.rigl import RigL as RigL
from gossamer.methods.weights.training.scl import SCL as SCL
from gossamer.methods.weights.training.sdgf import SdGf as SdGf
from gossamer.methods.weights.training.set import SET as SET
from gossamer.methods.weights.training.snip import SNIP as SNIP
from gossamer.methods.weights.training.soups import SparseModelSoups as SparseModelSoups
from gossamer.methods.weights.training.srste import SRSTE as SRSTE
from gossamer.methods.weights.training.static import StaticRandom as StaticRandom

CATALOGUE = (
    Random,
    Magnitude,
    Wanda,
    SparseGPT,
    StaticRandom,
    SNIP,
    GMP,
    SET,
    RigL,
    GraNet,
    SRSTE,
    SdGf,
    ISSP,
    SCL,
    WGSEF,
    MaskSparsity,
    IMP,
    SparseModelSoups,
)
