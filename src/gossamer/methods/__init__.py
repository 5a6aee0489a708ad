"""The published methods, one file each; the catalogue is a literal tuple per kind."""

from __future__ import annotations

import dataclasses
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


def build(text: str) -> Any:
    """A method from its name and options: `sparsegpt`, `sparsegpt:block=64,damping=0.02`.

    Raises UsageError for an unknown name or option, naming near ones, or a value that is refused.
    """
    name, _, rest = text.partition(":")
    kind = find(name)
    known = {each.name: each for each in dataclasses.fields(kind) if each.init}
    options = {}
    for word in filter(None, (word.strip() for word in rest.split(","))):
        option, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise UsageError(f"{word!r} in {text!r} is not option=value, such as block=64")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
            raise UsageError(f"{name} has no option {option!r}; {hint}")
        options[option] = _value(value)
    try:
        return kind(**options)
    except TypeError as error:
        raise UsageError(f"{text!r}: {error}") from None


def _value(text: str) -> Any:
    """A number, a truth value or else the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
