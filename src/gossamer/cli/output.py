"""What commands print: one JSON object on stdout, or text and tables for people."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.engine.progress import LOG

_LEAST = 30
"""Columns that sentences need at least."""


def print_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """The object on stdout, and nothing else."""
    print(json.dumps(data, indent=2, default=str))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: columns where they fit, else a paragraph for each row.

    Into a pipe or a file columns are as wide as they need; no word is ever broken.
    """
    widths = [max(len(str(row[at])) for row in [header, *rows]) for at in range(len(header))]
    wordy = any(" " in row[-1].strip() and len(row[-1]) > 20 for row in rows)
    print_text(title)
    if sum(widths) + 2 * (len(widths) - 1) <= _width():
        rule = ["-" * width for width in widths]
        for row in [header, rule, *rows]:
            print("  ".join(_cells(row, widths, wordy)).rstrip())
        return
    before = sum(widths[:-1]) + 2 * (len(widths) - 1)
    if wordy and _width() - before >= _LEAST:
        for row in [header, *rows]:
            lines = textwrap.wrap(row[-1], int(_width()) - before, break_long_words=False)
            print("  ".join([*_cells(row, widths, wordy)[:-1], lines[0]]).rstrip())
            for line in lines[1:]:
                print(" " * before + line)
        return
    for row in rows:
        print_text(row[0])
        pairs = zip(header[1:], row[1:], strict=True)
        cells = [
            f"{name}: {cell}" if name else cell for name, cell in pairs if cell not in ("", "-")
        ]
        print_text("; ".join(cells), indent="    ")


def print_text(text: str, indent: str = "") -> None:
    """A paragraph on stdout, broken between words where the terminal ends."""
    width = _width()
    if len(indent) + len(text) <= width:
        print(indent + text)
        return
    print(
        textwrap.fill(
            text, int(width), initial_indent=indent, subsequent_indent=indent or "  ",
            break_long_words=False, break_on_hyphens=False,
        )
    )  # fmt: skip


def note(text: str) -> None:
    """A line for people on stderr, through the log of `gossamer`."""
    LOG.info(text)


def _width() -> float:
    """Columns of the terminal; no limit for a pipe or a file, unless COLUMNS is set."""
    if os.environ.get("COLUMNS") or sys.stdout.isatty():
        return max(20, shutil.get_terminal_size().columns)
    return float("inf")


def _cells(row: Sequence[str], widths: Sequence[int], wordy: bool) -> list[str]:
    """Figures to the right; the first column, and all where the last holds sentences, to the left."""
    place = [str.ljust, *[str.ljust if wordy else str.rjust] * (len(row) - 1)]
    return [put(cell, width) for put, cell, width in zip(place, row, widths, strict=True)]
