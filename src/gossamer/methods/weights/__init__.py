"""Methods that make weights sparse, by their cards' names; `catalogue` lists them."""

from __future__ import annotations

from typing import Any

from gossamer.core.card import Card
from gossamer.methods.weights.catalogue import CATALOGUE


def _of_kind(*kinds: str) -> dict[str, type[Any]]:
    found: list[type[Any]] = [x for x in CATALOGUE if x.card.kind in kinds]
    return {x.card.name: x for x in found}


METHODS = _of_kind("score", "solver")
TRAINERS = _of_kind("trainer")
ROUNDS = _of_kind("rounds")
CARDS: tuple[Card, ...] = tuple(x.card for x in METHODS.values())
