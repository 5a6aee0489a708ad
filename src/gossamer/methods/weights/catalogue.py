"""The methods that make weights sparse, in the order in which they are listed.

A new method is its import and its line in the tuple: the public name, the registry, the command
line, the docs and the conformance tests follow from it.
"""

from gossamer.methods.weights.gmp import GMP as GMP
from gossamer.methods.weights.granet import GraNet as GraNet
from gossamer.methods.weights.imp import IMP as IMP
from gossamer.methods.weights.issp import ISSP as ISSP
from gossamer.methods.weights.magnitude import Magnitude as Magnitude
from gossamer.methods.weights.masksparsity import MaskSparsity as MaskSparsity
from gossamer.methods.weights.random import Random as Random
from gossamer.methods.weights.rigl import RigL as RigL
from gossamer.methods.weights.scl import SCL as SCL
from gossamer.methods.weights.sdgf import SdGf as SdGf
from gossamer.methods.weights.set import SET as SET
from gossamer.methods.weights.snip import SNIP as SNIP
from gossamer.methods.weights.soups import SparseModelSoups as SparseModelSoups
from gossamer.methods.weights.sparsegpt import SparseGPT as SparseGPT
from gossamer.methods.weights.srste import SRSTE as SRSTE
from gossamer.methods.weights.static import StaticRandom as StaticRandom
from gossamer.methods.weights.wanda import Wanda as Wanda
from gossamer.methods.weights.wgsef import WGSEF as WGSEF

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
