"""gossamer inspect."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from gossamer.cli.output import print_json, print_table
from gossamer.core.errors import UsageError
from gossamer.io import read_manifest


@dataclass
class Inspect:
    """Show what a compressed folder holds, without loading the model.

    Example: gossamer inspect --model gossamer-out
    """

    model: str
    """folder that gossamer compress wrote"""
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Print the manifest."""
        if not Path(self.model).is_dir():
            raise UsageError(f"--model {self.model}: no such folder")
        manifest = read_manifest(self.model)
        layers = {name: dataclasses.asdict(facts) for name, facts in manifest["layers"].items()}
        if self.json:
            print_json({**manifest, "layers": layers})
            return
        rows = [
            (name, f"{f['shape'][0]} x {f['shape'][1]}", f"{f['density']:.4f}", f["pattern"] or "-",
             f["dtype"])
            for name, f in layers.items()
        ]  # fmt: skip
        title = f"{self.model}: {manifest['method'] or 'zeros of unknown origin'}"
        print_table(title, ("layer", "shape", "density", "pattern", "dtype"), rows)
