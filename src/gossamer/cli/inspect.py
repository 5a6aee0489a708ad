"""gossamer inspect."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.cli.output import note, print_json, print_table
from gossamer.core.errors import UsageError
from gossamer.io import read_manifest
from gossamer.io.manifest import Decided, PackedLayer

HEADER = ("layer", "shape", "density", "pattern", "dtype", "1 to 8 rows", "batches")


@dataclass
class Inspect:
    """Show what a compressed folder holds, what serves each layer and why others stay dense.

    Example: gossamer inspect --model gossamer-out

    Nothing is loaded: kernels and reasons are those of the machine that wrote the folder.
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
        layers, decisions = manifest["layers"], manifest["decisions"]
        if self.json:
            print_json({**manifest, "layers": _plain(layers), "decisions": _plain(decisions)})
            return
        rows = [
            _row(name, layers.get(name), decisions.get(name)) for name in {**layers, **decisions}
        ]
        title = f"{self.model}: {manifest['method'] or 'zeros of unknown origin'}"
        print_table(title, HEADER, rows)
        for name, decided in decisions.items():
            if decided.reason:
                print(f"stays dense: {_printable(name)} ({decided.reason})")
        if not any(decided.reason or decided.decided for decided in decisions.values()):
            note(
                "this folder does not say why layers are packed or dense: it was saved from a bare "
                "model or by an older version; gs.save(gs.compress(model), ...) writes it"
            )


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(each) for name, each in facts.items()}


def _row(name: str, facts: PackedLayer | None, decided: Decided | None) -> tuple[str, ...]:
    """The cells of one layer; of dense ones only the decision is known, of old folders it is not."""
    known = facts or decided
    assert known is not None
    kernels = ("-", "-")
    if decided is not None:
        kernels = (decided.kernel or "dense", decided.batches or "dense")
    return (
        _printable(name),
        f"{known.shape[0]} x {known.shape[1]}",
        f"{known.density:.4f}",
        facts.pattern if facts and facts.pattern else "-",
        facts.dtype if facts else "-",
        *kernels,
    )


def _printable(name: str) -> str:
    """A name from a stranger's file, without what would steer a terminal."""
    return name if name.isprintable() else repr(name)
