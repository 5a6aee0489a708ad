"""What commands print: one JSON object on stdout, or tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.core.errors import MissingExtra


def print_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """The object on stdout, and nothing else."""
    print(json.dumps(data, indent=2, default=str))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise MissingExtra("rich", "cli") from None
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None).print(table)


def note(text: str) -> None:
    """A line for people on stderr."""
    import sys

    print(text, file=sys.stderr)
