"""Two models side by side: the result that `gs.compare` gives, as text, JSON or a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from gossamer.core.errors import UsageError
from gossamer.report.html import figures, page, speed_card, table
from gossamer.report.notes import speed_notes
from gossamer.report.tables import amounts, better, gain, ratio, row, speeds

HEADER = ("", "dense", "sparse", "ratio")


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes
    ----------
    quality : mapping
        `dense` and `sparse`, with `metric` and `better`: lower or higher.
    bytes : mapping
        `dense` and `sparse`: of all stored tensors, in memory.
    speed : mapping
        `dense` and `sparse`, with `unit`, `ratio` (sparse over dense), `repeats`, `threads` and
        more.
    machine : mapping
        What the speeds were measured on.
    models : mapping of str to str
        What the two are called.
    """

    quality: Mapping[str, Any]
    bytes: Mapping[str, Any]
    speed: Mapping[str, Any]
    machine: Mapping[str, Any]
    models: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Cells (what, dense, sparse, sparse over dense)."""
        return [
            row(
                f"{self.quality['metric']} ({better(self.quality)} is better)", self.quality, ".4f"
            ),
            amounts("bytes of all weights", self.bytes),
            *speeds(self.speed),
        ]

    @property
    def title(self) -> str:
        """The two models by name, as far as they have one."""
        names = {"dense": "Dense", "sparse": "sparse", **self.models}
        return f"{names['dense']} against {names['sparse']}"

    def __repr__(self) -> str:
        """One line with the three figures that matter."""
        quality = (
            f"{self.quality['metric']} {self.quality['dense']:.4g} -> {self.quality['sparse']:.4g}"
        )
        return (
            f"Comparison({quality}, bytes {ratio(self.bytes)}, "
            f"speed {gain(self.speed):.2f}x in the same loop)"
        )

    def _repr_html_(self) -> str:
        """The table, as notebooks show it."""
        cells = [[escape(cell) for cell in cells] for cells in self.rows()]
        return f"<p>{escape(self.title)}</p>{table(HEADER, cells)}"

    def __str__(self) -> str:
        """The rows as text, a line each."""
        rows = [HEADER, *self.rows()]
        widths = [max(len(cells[at]) for cells in rows) for at in range(4)]
        lines = (
            [cells[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
            for cells in rows
        )
        return "\n".join("  ".join(line).rstrip() for line in lines)

    def to_json(self) -> dict[str, Any]:
        """As `gossamer compare --json` prints it."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write a page (.html), or the object (.json); raises UsageError for another ending."""
        place = Path(path)
        if place.suffix == ".json":
            place.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        elif place.suffix == ".html":
            place.write_text(self._page())
        else:
            raise UsageError(f"{place}: a comparison is saved as .html or .json")
        return place

    def _page(self) -> str:
        quality, speed = self.quality, self.speed
        cards = [
            (ratio(self.bytes), "the bytes of all weights"),
            speed_card(speed),
            (f"{quality['sparse'] - quality['dense']:+.4f}", str(quality["metric"])),
        ]
        parts = [
            f"<h1>{escape(self.title)}</h1>",
            figures(cards),
            table(HEADER, [[escape(cell) for cell in cells] for cells in self.rows()]),
            *(f"<p>{escape(line)}</p>" for line in speed_notes(speed)),
            "<h2>Machine</h2>",
            table(("", ""), [[escape(str(k)), escape(str(v))] for k, v in self.machine.items()]),
        ]
        return page(self.title, parts)
