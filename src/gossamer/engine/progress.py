"""Progress on stderr for those who ask for it, and in the log of `gossamer` for all others."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

LOG = logging.getLogger("gossamer")
PAUSE = 10.0
"""Seconds between two lines where no bar can be drawn."""
_WORTH = 2.0
"""Seconds from which on a finished step is worth a line."""


class Step(Protocol):
    """Tells what was done: `advance` units more."""

    def __call__(self, label: str, advance: int = 1, /) -> None: ...


@contextmanager
def track(total: int | None, enabled: bool, what: str = "pruning") -> Iterator[Step]:
    """Yield `step(label, advance=1)`, to be called as units are finished, or with 0 inside of one.

    On a terminal that is a bar, where rich is installed; elsewhere a line every ten seconds. Where
    it is not enabled, the lines go to the logger `gossamer` at level INFO. total: how many units;
    None for a step of unknown length.
    """
    lines = _Lines(total, what, _print if enabled else LOG.info)
    bar = _bar(total, what) if enabled and sys.stderr.isatty() else None
    if bar is not None:
        with bar as step:

            def both(label: str, advance: int = 1, /) -> None:
                lines.count(label, advance)
                step(label, advance)

            yield both
        lines.finish()
    elif enabled:
        with _beating(lines):
            yield lines.count
        lines.finish()
    else:
        yield lines.step
        lines.finish()


class _Lines:
    """How far a step is, as lines of text."""

    def __init__(self, total: int | None, what: str, write: Callable[[str], None]) -> None:
        self.total, self.what, self.write = total, what, write
        self.start = self.last = time.monotonic()
        self.done, self.label = 0, ""

    def count(self, label: str, advance: int = 1, /) -> None:
        """So many more units are finished."""
        self.done, self.label = self.done + advance, label

    def step(self, label: str, advance: int = 1, /) -> None:
        """The same, with a line if the last one is long ago."""
        self.count(label, advance)
        if time.monotonic() - self.last >= PAUSE:
            self.show()

    def show(self) -> None:
        """A line of how far it is."""
        self.last = time.monotonic()
        parts = [f"{self.done} of {self.total}"] if self.total else []
        parts += [self.label] if self.label else []
        parts.append(f"{self.last - self.start:.0f} s")
        self.write(f"{self.what}: {', '.join(parts)}")

    def finish(self) -> None:
        """A line of how long it took, if it took long."""
        taken = time.monotonic() - self.start
        if taken >= _WORTH:
            self.write(f"{self.what}: {taken:.1f} s")


@contextmanager
def _beating(lines: _Lines) -> Iterator[None]:
    """Show a line every ten seconds, also while one unit takes longer."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(PAUSE):
            lines.show()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bar(total: int | None, what: str) -> AbstractContextManager[Step] | None:
    """A bar that goes away when it is full; None where rich is not installed."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None

    @contextmanager
    def drawn() -> Iterator[Step]:
        columns = (
            progress.TextColumn(what), progress.BarColumn(), progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(), progress.TextColumn("{task.description}"),
        )  # fmt: skip
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda label, advance=1: bar.update(task, advance=advance, description=label)

    return drawn()
