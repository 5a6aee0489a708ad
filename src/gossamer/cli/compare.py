"""gossamer compare."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gossamer.api import compare
from gossamer.api_activations import calibrate_activations, method_of
from gossamer.cli.activations import calibration
from gossamer.cli.inputs import (
    BUNDLED,
    BUNDLED_TEXT,
    check_model,
    eval_bytes,
    read_model,
    read_text,
)
from gossamer.cli.output import note, print_json, print_table, print_text
from gossamer.core.errors import UsageError
from gossamer.engine.serve.compress import compress
from gossamer.report.comparison import HEADER
from gossamer.report.notes import speed_notes


@dataclass
class Compare:
    """Measure two models side by side: quality, bytes, and speed in one process.

    Example: gossamer compare testbed:lm gossamer-out
    """

    PLACES = ("dense", "sparse")

    sparse: str
    """folder of the compressed model"""
    dense: str = BUNDLED
    """folder or hub name of the dense model, or testbed:lm"""
    data: str = BUNDLED_TEXT
    """held-out text: a file, a folder of text files, or testbed:text"""
    eval_bytes: int | None = None
    """bytes of that text to measure on, 0 for all; by default 40000 for models with a tokenizer and
    all for the bundled one"""
    tokens: int = 64
    """tokens to decode for the speed"""
    activations: str | None = None
    """method that chooses the inputs of the second model's layers that each new token reads, such
    as teal:density=0.5; quality is that of a text in which every token chooses"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype in which both models are read and timed"""
    out: str | None = None
    """also write the comparison to this file, as a page (.html) or an object (.json)"""
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Measure and print."""
        from gossamer.testbed import heldout_text

        if self.tokens < 1 or (self.eval_bytes or 0) < 0:
            raise UsageError("--tokens is at least 1, --eval-bytes at least 0")
        if self.out is not None and Path(self.out).suffix not in (".html", ".json"):
            raise UsageError(f"--out {self.out}: name a file that ends in .html or .json")
        text = read_text(self.data, "--data", heldout_text)
        check_model(self.sparse, "--sparse")
        check_model(self.dense, "--dense")
        activations = None if self.activations is None else method_of(self.activations)
        dense = read_model(self.dense, self.dtype, option="--dense")
        sparse = read_model(self.sparse, self.dtype, option="--sparse")
        if activations is not None:
            data = calibration(sparse, BUNDLED_TEXT)
            plan = calibrate_activations(sparse.model, activations, data, progress=True)
            compress(sparse.model, activations=plan)
        limit = self.eval_bytes if self.eval_bytes is not None else eval_bytes(dense)
        report = compare(
            dense.model, sparse.model, text[: limit or len(text)], tokenizer=dense.tokenizer,
            tokens=self.tokens, progress=True,
        )  # fmt: skip
        names = {"dense": self.dense, "sparse": self.sparse}
        report = dataclasses.replace(report, models=names)
        if self.out is not None:
            report.save(self.out)
            note(f"wrote {self.out}")
        if self.json:
            print_json(report.to_json())
        else:
            print_table(report.title, HEADER, report.rows())
            for line in speed_notes(report.speed):
                print_text(line)
