"""Cards read from the sources of methods, which says what exists without importing torch."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from gossamer.core.card import Card


@dataclass(frozen=True)
class Listed:
    """A method's card, the name of its class, and the docstring of its module."""

    card: Card
    name: str
    text: str

    @property
    def summary(self) -> str:
        """The first line of the docstring, behind the method's name."""
        return self.text.partition("\n")[0].partition(": ")[2].rstrip(".")


def listed(topic: str) -> list[Listed]:
    """The published methods of one topic, by year and name; none where none is built yet.

    The topic's `__init__` is read for what it imports, and each of these modules for its card,
    whose arguments are literals.
    """
    folder = resources.files("gossamer.methods") / topic
    registry = folder / "__init__.py"
    if not registry.is_file():
        return []
    found = [
        _read(folder / f"{line.module.rpartition('.')[2]}.py", line.names[0].name)
        for line in ast.parse(registry.read_text(encoding="utf-8")).body
        if isinstance(line, ast.ImportFrom) and line.module
    ]
    found.sort(key=lambda x: (x.card.year, x.card.name))
    return [x for x in found if x.card.link]


def _read(file: Traversable, name: str) -> Listed:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    chosen = next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == name)
    call = next(
        line.value
        for line in chosen.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and line.target.id == "card"
    )
    assert isinstance(call, ast.Call)
    facts = {str(x.arg): ast.literal_eval(x.value) for x in call.keywords}
    return Listed(Card(**facts), name, ast.get_docstring(tree) or "")
