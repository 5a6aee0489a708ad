"""Methods that make weights sparse. A new method is one file and one line in each table here."""

from __future__ import annotations

from typing import Any

from gossamer.core.card import Card
from gossamer.methods.weights.regularizers.masksparsity import MaskSparsity
from gossamer.methods.weights.regularizers.wgsef import WGSEF
from gossamer.methods.weights.scores.magnitude import Magnitude
from gossamer.methods.weights.scores.random import Random
from gossamer.methods.weights.scores.wanda import Wanda
from gossamer.methods.weights.solvers.sparsegpt import SparseGPT
from gossamer.methods.weights.training.gmp import GMP
from gossamer.methods.weights.training.granet import GraNet
from gossamer.methods.weights.training.imp import IMP
from gossamer.methods.weights.training.issp import ISSP
from gossamer.methods.weights.training.keep import Keep
from gossamer.methods.weights.training.rigl import RigL
from gossamer.methods.weights.training.scl import SCL
from gossamer.methods.weights.training.set import SET
from gossamer.methods.weights.training.snip import SNIP
from gossamer.methods.weights.training.soups import SparseModelSoups
from gossamer.methods.weights.training.srste import SRSTE
from gossamer.methods.weights.training.static import StaticRandom

CARDS: tuple[Card, ...] = (Random.card, Magnitude.card, Wanda.card, SparseGPT.card)
METHODS: dict[str, type[Any]] = {
    "random": Random,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}

TRAINERS: dict[str, type[Any]] = {
    "staticrandom": StaticRandom,
    "snip": SNIP,
    "gmp": GMP,
    "set": SET,
    "rigl": RigL,
    "granet": GraNet,
    "srste": SRSTE,
    "issp": ISSP,
    "scl": SCL,
    "wgsef": WGSEF,
    "masksparsity": MaskSparsity,
}

ROUNDS: dict[str, type[Any]] = {"imp": IMP, "sparsemodelsoups": SparseModelSoups}

__all__ = [
    "CARDS",
    "GMP",
    "IMP",
    "ISSP",
    "METHODS",
    "ROUNDS",
    "SCL",
    "SET",
    "SNIP",
    "SRSTE",
    "TRAINERS",
    "WGSEF",
    "GraNet",
    "Keep",
    "Magnitude",
    "MaskSparsity",
    "Random",
    "RigL",
    "SparseGPT",
    "SparseModelSoups",
    "StaticRandom",
    "Wanda",
]
