"""Methods and allocations as text, `name:option=value,...`, as files and the command line have them.

The value of an option may be a method itself. Its own options follow behind a dot:
`dsnot:start=sparsegpt,start.block=64`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from gossamer.core.card import Card
from gossamer.core.errors import UsageError

Build = Callable[[str], Any]
"""Makes a method from such a text."""


def build(text: str, kinds: Mapping[str, type[Any]], what: str, method: Build | None = None) -> Any:
    """An instance of one of the dataclasses `kinds`: `owl`, `sparsegpt:block=64,damping=0.02`.

    method: builds options that are methods. Raises UsageError for an unknown name or option, naming
    near ones, or a value that is refused.
    """
    kind, options = parts(text, kinds, what, method)
    try:
        return kind(**options)
    except TypeError as error:
        raise UsageError(f"{text!r}: {error}") from None


def parts(
    text: str, kinds: Mapping[str, type[Any]], what: str, method: Build | None = None
) -> tuple[type[Any], dict[str, Any]]:
    """The dataclass that a text names, and its options; raises UsageError as `build` does."""
    name, _, rest = text.partition(":")
    kind = known(name, kinds, what)
    _check_options(kind)
    fields = {each.name: each for each in dataclasses.fields(kind) if each.init}
    inner = _methods(fields) if method is not None else {}
    options: dict[str, Any] = {}
    nested: dict[str, list[str]] = {}
    for word in filter(None, (word.strip() for word in rest.split(","))):
        option, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise UsageError(
                f"{word!r} in {text!r} is not option=value, such as {_example(fields, option)}"
            )
        option, dot, deeper = option.partition(".")
        known(option, fields, f"option of {name.strip()}")
        if dot and option not in inner:
            raise UsageError(f"{word!r} in {text!r}: {option} is no method, so it has no options")
        if option not in inner:
            options[option] = _value(value)
        elif dot:
            nested.setdefault(option, []).append(f"{deeper}={value}")
        else:
            if ":" in value:
                raise UsageError(
                    f"{word!r} in {text!r}: options of {option} follow behind a dot, such as "
                    f"{option}={value.partition(':')[0]},{option}.{value.partition(':')[2]}"
                )
            inner[option] = value
            nested.setdefault(option, [])
    for option, given in nested.items():
        assert method is not None
        options[option] = method(":".join(filter(None, (inner[option], ",".join(given)))))
    return kind, options


def _check_options(kind: type[Any]) -> None:
    """Raise UsageError for a layer, whose sizes are those of the model that holds it."""
    if not hasattr(kind, "__dataclass_fields__"):
        raise UsageError(
            f"{kind.card.name} is a layer: make it in Python with "
            f"gs.{kind.card.topic}.{kind.__name__}(...) and put it into a model"
        )


def _methods(fields: Mapping[str, Any]) -> dict[str, str]:
    """The names of the options that are methods, with their default."""
    cards = {name: getattr(each.default_factory, "card", None) for name, each in fields.items()}
    return {name: card.name for name, card in cards.items() if isinstance(card, Card)}


def listed(text: str) -> list[str]:
    """Several such texts in one: `dense,rigl:every=50,drop=0.3,set` are three."""
    found: list[str] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        if found and "=" in word and ":" not in word:
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


def known(word: str, choices: Mapping[str, Any], what: str) -> Any:
    """What stands under a word, in any case; raises UsageError naming near ones."""
    key = word.strip().lower()
    if key in choices:
        return choices[key]
    near = get_close_matches(key, choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(choices) or 'none'}"
    raise UsageError(f"unknown {what} {word!r}; {hint}")


def _example(fields: Mapping[str, Any], option: str) -> str:
    return f"{option if option in fields else next(iter(fields), 'option')}=1"


def _value(text: str) -> Any:
    """A number, a truth value or else the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
