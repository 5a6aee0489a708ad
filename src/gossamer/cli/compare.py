"""gossamer compare."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gossamer.cli.inputs import BUNDLED, BUNDLED_TEXT, check_model, read_model, read_text
from gossamer.cli.output import print_json, print_table
from gossamer.cli.tasks import task_of
from gossamer.core.errors import UsageError


@dataclass
class Compare:
    """Measure two models side by side: quality, and speed in one process.

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
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Measure and print."""
        from gossamer.testbed import heldout_text

        check_model(self.sparse)
        check_model(self.dense)
        text = read_text(self.data, "--data", heldout_text)
        dense = read_model(self.dense, self.dtype)
        sparse = read_model(self.sparse, self.dtype)
        if dense.causal != sparse.causal:
            raise UsageError("one is a causal language model and the other an encoder")
        task = task_of(dense, text)
        task.check(2, self.tokens)
        quality = {
            name: task.quality(dense.model, model)
            for name, model in (("dense", dense.model), ("sparse", sparse.model))
        }
        speed = task.speed(dense.model, sparse.model, self.tokens)
        if self.json:
            print_json(
                {
                    "quality": {"metric": task.metric, "better": task.better, **quality},
                    "speed": dataclasses.asdict(speed),
                }
            )
            return
        rows = [
            (task.metric, f"{quality['dense']:.4f}", f"{quality['sparse']:.4f}",
             f"{quality['sparse'] / quality['dense']:.3f}"),
            (speed.unit, f"{speed.dense:.1f}", f"{speed.sparse:.1f}", f"{speed.ratio:.2f}"),
        ]  # fmt: skip
        print_table("Comparison", ("", "dense", "sparse", "ratio"), rows)
