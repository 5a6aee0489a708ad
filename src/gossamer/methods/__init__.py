"""The published methods, one file each; the catalogue is a literal tuple per kind."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from gossamer.core import words
from gossamer.core.card import Card
from gossamer.core.words import known
from gossamer.methods import weights


def cards() -> tuple[Card, ...]:
    """Every method's card, in the order of the catalogue."""
    return weights.CARDS + tuple(x.card for x in (weights.TRAINERS | weights.ROUNDS).values())


def verdicts() -> dict[str, str]:
    """What became of each method's claim here, by its card's name, for those that were tried."""
    return json.loads((resources.files("gossamer.methods") / "verdicts.json").read_text())


def find(name: str) -> type[Any]:
    """The method's class by its card's name, in any case; raises UsageError naming near misses."""
    return known(name, _all(), "method")


def build(text: str) -> Any:
    """A method from its name and options: `sparsegpt`, `sparsegpt:block=64,damping=0.02`.

    Raises UsageError for an unknown name or option, naming near ones, or a value that is refused.
    """
    return words.build(text, _all(), "method")


def _all() -> dict[str, type[Any]]:
    return weights.METHODS | weights.TRAINERS | weights.ROUNDS
