"""gossamer compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gossamer.api import compare
from gossamer.cli.inputs import BUNDLED, BUNDLED_TEXT, check_model, read_model, read_text
from gossamer.cli.output import note, print_json, print_table
from gossamer.core.errors import UsageError
from gossamer.report.comparison import HEADER


@dataclass
class Compare:
    """Measure two models side by side: quality, bytes, and speed in one process.

    Example: gossamer compare --dense testbed:lm --sparse gossamer-out
    """

    sparse: str
    """folder of the compressed model"""
    dense: str = BUNDLED
    """folder of the dense model, or testbed:lm"""
    data: str = BUNDLED_TEXT
    """held-out text: a file, a folder, or testbed:text"""
    tokens: int = 64
    """tokens to decode for the speed"""
    dtype: str = "bfloat16"
    """float32 or bfloat16"""
    out: str | None = None
    """also write the comparison to this file, as a page (.html) or an object (.json)"""
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Measure and print."""
        from gossamer.testbed import heldout_text

        check_model(self.sparse)
        check_model(self.dense)
        if self.out is not None and Path(self.out).suffix not in (".html", ".json"):
            raise UsageError(f"--out {self.out}: name a file that ends in .html or .json")
        text = read_text(self.data, "--data", heldout_text)
        dense = read_model(self.dense, self.dtype)
        sparse = read_model(self.sparse, self.dtype)
        report = compare(
            dense.model, sparse.model, text, tokenizer=dense.tokenizer, tokens=self.tokens
        )
        if self.out is not None:
            report.save(self.out)
            note(f"wrote {self.out}")
        if self.json:
            print_json(report.to_json())
        else:
            print_table("Comparison", HEADER, report.rows())
