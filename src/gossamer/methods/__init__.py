"""The published methods, one file each; the catalogue is a literal tuple per kind."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from typing import Any

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods import weights


def cards() -> tuple[Card, ...]:
    """Every method's card, in the order of the catalogue."""
    return weights.CARDS + tuple(x.card for x in (weights.TRAINERS | weights.ROUNDS).values())


def verdicts() -> dict[str, str]:
    """What became of each method's claim here, by its card's name, for those that were tried."""
    return json.loads((resources.files("gossamer.methods") / "verdicts.json").read_text())


def find(name: str) -> type[Any]:
    """The method's class by its card's name, in any case; raises UsageError naming near misses."""
    word = name.strip().lower()
    known = weights.METHODS | weights.TRAINERS | weights.ROUNDS
    if word in known:
        return known[word]
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
    raise UsageError(f"unknown method {name!r}; {hint}")
