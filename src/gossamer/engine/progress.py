"""Progress on stderr, for those who ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from gossamer.core.errors import MissingExtra


class Step(Protocol):
    """Tells what was done: `advance` units more."""

    def __call__(self, label: str, advance: int = 1, /) -> None: ...


@contextmanager
def track(total: int | None, enabled: bool, what: str = "pruning") -> Iterator[Step]:
    """Yield `step(label, advance=1)`, to be called as units are finished, or with 0 inside of one;
    draws a bar when enabled. total: None where it is not known."""
    if not enabled:
        yield lambda label, advance=1: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        raise MissingExtra("rich", "cli") from None
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda label, advance=1: bar.update(task, advance=advance, description=label)
