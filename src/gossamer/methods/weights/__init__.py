"""Methods that make weights sparse. A new method is one file and one line in each table here."""

from __future__ import annotations

from typing import Any

from gossamer.core.card import Card
from gossamer.methods.weights.scores.magnitude import Magnitude
from gossamer.methods.weights.scores.random import Random
from gossamer.methods.weights.scores.wanda import Wanda
from gossamer.methods.weights.solvers.sparsegpt import SparseGPT

CARDS: tuple[Card, ...] = (Random.card, Magnitude.card, Wanda.card, SparseGPT.card)
METHODS: dict[str, type[Any]] = {
    "random": Random,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}

__all__ = ["CARDS", "METHODS", "Magnitude", "Random", "SparseGPT", "Wanda"]
