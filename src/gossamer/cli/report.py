"""gossamer report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gossamer.cli.output import note
from gossamer.core.errors import FormatError, UsageError
from gossamer.report.html import render


@dataclass
class Report:
    """Write the HTML report of a finished compression anew from its result.json.

    Example: gossamer report gossamer-out --out report.html
    """

    PLACES = ("model",)

    model: str
    """folder that gossamer compress wrote"""
    out: str = "report.html"
    """file to write"""
    overwrite: bool = False
    """replace the file if it is there"""

    def run(self) -> None:
        """Render the page."""
        path = Path(self.model) / "result.json"
        if not path.is_file():
            raise UsageError(
                f"--model {self.model}: holds no result.json; give a folder that gossamer compress wrote"
            )
        if Path(self.out).exists() and not self.overwrite:
            raise UsageError(f"--out {self.out}: is there already; add --overwrite to replace it")
        try:
            page = render(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        Path(self.out).write_text(page)
        note(f"wrote {self.out}")
