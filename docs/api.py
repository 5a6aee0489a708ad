"""The pages of the API reference: every public name, grouped by what it is."""

from __future__ import annotations

import inspect
from pathlib import Path

import gossamer
from gossamer import methods

GROUPS = {
    "Functions": "What a program calls.",
    "Patterns": "Which weights may be zero together. A string such as `2:4` serves as well.",
    "Allocations": "How one density becomes one for each layer.",
    "Results and data": "What the functions return and take.",
    "Errors": "Each names what is wrong, where, and what to do.",
}


def write(folder: Path) -> None:
    """Write the pages anew."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def pages() -> dict[str, str]:
    """File name to content."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in sorted(gossamer.__all__, key=str.lower):
        groups[group_of(getattr(gossamer, name))].append(name)
    parts = ["# API reference\n\nEvery public name, with `import gossamer as gs`.\n"]
    parts += [
        f"## {group}\n\n{GROUPS[group]}\n\n{summary('gossamer', groups[group])}" for group in GROUPS
    ]
    for topic in filter(methods.topic, methods.TOPICS):
        module = methods.topic(topic)
        parts.append(
            f"## gs.{topic}\n\nMethods, each with [a page of its own](../methods/index.md).\n\n"
            f"{summary(module.__name__, sorted(module.__all__, key=str.lower))}"
        )
    return {"index.md": "\n".join(parts)}


def group_of(thing: object) -> str:
    """The group of a public name, from where it is defined."""
    module = getattr(thing, "__module__", "")
    if inspect.isfunction(thing):
        return "Functions"
    by_module = {
        "core.pattern": "Patterns",
        "core.allocation": "Allocations",
        "core.errors": "Errors",
    }
    return by_module.get(module.removeprefix("gossamer."), "Results and data")


def summary(module: str, names: list[str]) -> str:
    """A table of names with the first lines of their docstrings, and a page for each."""
    lines = "\n".join(f"   {name}" for name in names)
    return (
        f"```{{eval-rst}}\n.. currentmodule:: {module}\n.. autosummary::\n   :toctree: names\n"
        f"   :nosignatures:\n\n{lines}\n```\n"
    )
