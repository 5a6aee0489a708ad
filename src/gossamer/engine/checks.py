"""What a method needs, with what it wraps, and whether an engine can serve it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.engine.protocols import LearnedMask, Method, Scorer, Solver, Wraps


def needs_of(method: Method) -> tuple[str, ...]:
    """The statistics that a method needs, and those of the method that it starts from."""
    inner = needs_of(method.start) if isinstance(method, Wraps) else ()
    return tuple(dict.fromkeys((*method.card.needs, *inner)))


def patterns_of(method: Method) -> tuple[str, ...]:
    """The patterns that a method admits, and so does the method that it starts from."""
    inner = patterns_of(method.start) if isinstance(method, Wraps) else method.card.patterns
    return tuple(x for x in method.card.patterns if x in inner)


def check_method(method: Any, statistics: Collection[str]) -> None:
    """Raise UsageError unless `method` is a method that needs no more than `statistics`."""
    if isinstance(method, type):
        raise UsageError(f"method is the class {method.__name__}; pass an instance of it")
    card = getattr(method, "card", None)
    if not isinstance(card, Card) or not isinstance(method, (Scorer, Solver)):
        raise UsageError(
            f"{type(method).__name__} is not a pruning method: it needs a card and either "
            "score(weight, stats) or solve(weight, stats, pattern, density)"
        )
    if isinstance(method, Wraps):
        check_method(method.start, statistics)
    for need in card.needs:
        if need not in statistics:
            raise UsageError(f"{card.name} needs {need}, which calibration does not gather")


def check_no_mask(method: Any, who: str) -> None:
    """Raise UsageError for a method that learns masks where only topology methods are followed."""
    if isinstance(method, LearnedMask) and not isinstance(method, type):
        raise UsageError(
            f"{who} follows topology methods alone; {method.card.name} learns masks: use it in a "
            "loop of your own, inside gs.sparse_training"
        )
