"""Progress on stderr, for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gossamer.core.errors import MissingExtra


@contextmanager
def track(total: int, enabled: bool, what: str = "pruning") -> Iterator[Callable[[str], None]]:
    """Yield `step(label)`, to be called after each finished unit; draws a bar when enabled."""
    if not enabled:
        yield lambda label: None
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
        yield lambda label: bar.update(task, advance=1, description=label)
