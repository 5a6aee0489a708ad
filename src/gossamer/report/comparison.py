"""Two models side by side: the result that `gs.compare` gives, as text, JSON or a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from gossamer.core.errors import UsageError
from gossamer.report.html import figures, page, table
from gossamer.report.tables import better, human, ratio, row, same_loop

HEADER = ("", "dense", "sparse", "ratio")


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. Each mapping has `dense` and `sparse`.

    quality: with `metric` and `better`, lower or higher. bytes: of all stored tensors, in memory.
    speed: with `unit`, `ratio` (sparse over dense), `repeats`, `threads` and more, as in
    `engine.evaluate.Speed`. machine: what the speeds were measured on.
    """

    quality: Mapping[str, Any]
    bytes: Mapping[str, Any]
    speed: Mapping[str, Any]
    machine: Mapping[str, Any]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Cells (what, dense, sparse, sparse over dense)."""
        return [
            row(f"{self.quality['metric']} ({better(self.quality)} is better)", self.quality, ".4f"),
            ("bytes of all weights", human(self.bytes["dense"]), human(self.bytes["sparse"]),
             ratio(self.bytes)),
            row(f"speed, {self.speed['unit']}", self.speed, ".1f"),
            *same_loop(self.speed),
        ]  # fmt: skip

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
            (f"{speed['ratio']:.2f}x", f"the speed, {speed['sparse']:.1f} {speed['unit']}"),
            (f"{quality['sparse'] - quality['dense']:+.4f}", str(quality["metric"])),
        ]
        how = (
            f"Speed: both models in one process in turns, median of {speed['repeats']} repeats, "
            f"{speed['threads']} threads."
        )
        parts = [
            "<h1>Dense against sparse</h1>",
            figures(cards),
            table(HEADER, [[escape(cell) for cell in cells] for cells in self.rows()]),
            f"<p>{escape(how)}</p>",
            "<h2>Machine</h2>",
            table(("", ""), [[escape(str(k)), escape(str(v))] for k, v in self.machine.items()]),
        ]
        return page("Dense against sparse", parts)
