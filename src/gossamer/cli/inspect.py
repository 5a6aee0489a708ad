"""gossamer inspect."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.cli.output import note, print_json, print_table, print_text
from gossamer.core.errors import FormatError, UsageError
from gossamer.io import read_manifest, verify
from gossamer.io.manifest import NAME, Decided, PackedLayer
from gossamer.report.notes import coverage_notes, layer_notes, starred
from gossamer.report.tables import human

HEADER = ("layer", "layers", "shape", "density", "pattern", "dtype", "1 to 8 rows", "batches")


@dataclass
class Inspect:
    """Show what a compressed folder holds, what serves each layer and why others stay dense.

    Example: gossamer inspect gossamer-out

    Nothing is loaded: kernels and reasons are those of the machine that wrote the folder.
    """

    PLACES = ("model",)

    model: str
    """folder that gossamer compress or gs.save wrote"""
    layers: bool = False
    """a line for every layer, instead of one for all layers of a kind"""
    verify: bool = False
    """compare every file with the digest that was written with it, and say what has changed"""
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Print the manifest."""
        folder = Path(self.model)
        _check(folder)
        if self.verify:
            _verify(folder, self.json)
            return
        manifest = read_manifest(folder)
        layers, decisions = manifest["layers"], manifest["decisions"]
        if self.json:
            print_json(
                {**manifest, "layers": _served(layers, decisions), "decisions": _plain(decisions)}
            )
            return
        files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print_table(
            f"{self.model}: {manifest['method'] or 'zeros of unknown origin'}, {human(files)}B",
            HEADER,
            _rows(layers, decisions, self.layers),
        )
        for line in coverage_notes(_coverage(folder)):
            print_text(_printable(line))
        if not any(decided.reason or decided.decided for decided in decisions.values()):
            note(
                "this folder does not say why layers are packed or dense: it was saved from a bare "
                "model or by an older version; gs.save(gs.compress(model), ...) writes it"
            )
            return
        facts = [{"name": name, **dataclasses.asdict(each)} for name, each in decisions.items()]
        for line in layer_notes(facts):
            print_text(_printable(line))


def _check(folder: Path) -> None:
    """Raise UsageError for a folder that Gossamer did not write, with what it is."""
    if not folder.is_dir():
        raise UsageError(f"--model {folder}: no such folder")
    if (folder / NAME).exists() or (folder / NAME).is_symlink():
        return
    if (folder / "config.json").exists():
        raise UsageError(
            f"--model {folder}: is an ordinary model folder, in which nothing is packed (it has no "
            f"{NAME}); gossamer compress {folder} --out small writes a packed one"
        )
    raise UsageError(f"--model {folder}: holds no {NAME}; give a folder that Gossamer wrote")


def _verify(folder: Path, as_json: bool) -> None:
    """Print what has changed; raises FormatError if anything has."""
    wrong = verify(folder)
    if as_json:
        print_json({"folder": str(folder), "wrong": wrong})
    elif not wrong:
        print(f"{folder}: every file is as it was written")
    if wrong:
        raise FormatError(f"{folder}: {'; '.join(map(_printable, wrong))}")


def _coverage(folder: Path) -> Mapping[str, Any]:
    """What result.json says of the whole model, where gossamer compress wrote the folder."""
    try:
        found = json.loads((folder / "result.json").read_text())["coverage"]["pruned"]
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(each) for name, each in facts.items()}


def _served(layers: dict[str, PackedLayer], decisions: dict[str, Decided]) -> dict[str, Any]:
    """Each packed layer with what serves it; `window` is the kernel size of a convolution."""
    found = _plain(layers)
    for name, facts in found.items():
        decided = decisions.get(name)
        facts["window"] = facts.pop("kernel")
        facts["kernel"] = decided.kernel if decided else None
        facts["batches"] = decided.batches if decided else None
    return found


def _rows(
    layers: dict[str, PackedLayer], decisions: dict[str, Decided], every: bool
) -> list[tuple[str, ...]]:
    """The cells of each layer, or of all layers that differ in their blocks' numbers alone."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for name in {**layers, **decisions}:
        shown, density, cells = _cells(name, layers.get(name), decisions.get(name))
        groups.setdefault((shown if every else starred(shown), *cells), []).append(density)
    return [
        (name, str(len(densities)), shape, _range(densities), *rest)
        for (name, shape, *rest), densities in groups.items()
    ]


def _cells(
    name: str, facts: PackedLayer | None, decided: Decided | None
) -> tuple[str, float, tuple[str, ...]]:
    """Of dense layers only the decision is known, of old folders it is not."""
    known = facts or decided
    assert known is not None
    kernels = ("-", "-")
    if decided is not None:
        kernels = (decided.kernel or "dense", decided.batches or "dense")
    cells = (
        " x ".join(map(str, known.shape)),
        facts.pattern if facts and facts.pattern else "-",
        facts.dtype if facts else "-",
        *kernels,
    )
    return _printable(name), known.density, cells


def _range(densities: list[float]) -> str:
    low, high = min(densities), max(densities)
    return f"{low:.4f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}"


def _printable(name: str) -> str:
    """A name from a stranger's file, without what would steer a terminal."""
    return name if name.isprintable() else repr(name)
