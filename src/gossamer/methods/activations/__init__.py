"""Activations: which inputs of a layer, neurons or tokens are computed."""

from gossamer.methods.activations.coreinfer import CoreInfer
from gossamer.methods.activations.rsparse import RSparse
from gossamer.methods.activations.sirius import Sirius
from gossamer.methods.activations.teal import TEAL
from gossamer.methods.activations.wina import WINA

__all__ = [
    "TEAL",
    "WINA",
    "CoreInfer",
    "RSparse",
    "Sirius",
]
