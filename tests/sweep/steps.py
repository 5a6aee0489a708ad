"""The path of one family in this process: prune six ways, compress, compare, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibration
import checks
import torch
from families import NEW_TOKENS, Family
from rows import Row
from safetensors.torch import save_file
from torch import nn

import gossamer as gs

METHODS = {
    "sparsegpt": gs.weights.SparseGPT,
    "wanda": gs.weights.Wanda,
    "magnitude": gs.weights.Magnitude,
}
PATTERNS = {"50%": (gs.Unstructured(), 0.5), "2:4": (gs.NM(2, 4), 0.5)}
SPARSE = "magnitude 90%"
"""Sparse enough that convolutions are packed too."""
QUICK = ("sparsegpt 50%", "wanda 2:4", SPARSE)


def variants(quick: bool = False) -> dict[str, tuple[Any, Any, float]]:
    """Name to method, pattern and density; with `quick` one of each method."""
    found = {
        f"{method} {pattern}": (kind(), *how)
        for method, kind in METHODS.items()
        for pattern, how in PATTERNS.items()
    }
    found[SPARSE] = (gs.weights.Magnitude(), gs.Unstructured(), 0.1)
    return {name: found[name] for name in QUICK} if quick else found


def walk(row: Row, family: Family, place: Path, ways: dict[str, tuple[Any, Any, float]]) -> None:
    """Everything up to the saved folders; `fresh.py` reads them in other processes."""
    with row.step("build"):
        model, _ = family.make(), family.data()
        row.facts["model"] = type(model).__name__
        row.facts["parameters"] = sum(p.numel() for p in model.parameters())
    if not row.passed("build"):
        return
    for name, (method, pattern, density) in ways.items():
        result = prune(row, family, name, method, pattern, density)
        if row.passed(f"prune {name}") and name.startswith("wanda"):
            with row.step("calibration"):
                calibration.check(family, list(result.supports))
        if row.passed(f"prune {name}"):
            pack(row, family, name, result, place)
    row.facts["gap"] = max(row.facts.pop("gaps", {}).values(), default=None)


def prune(row: Row, family: Family, name: str, method: Any, pattern: Any, density: float) -> Any:
    """Prune a new instance and check what the result says; None where that failed."""
    model, data = family.make(), family.data()
    checks.run(model, data)  # transformers hangs hooks of its own on at the first call
    model.train()
    before = checks.snapshot(model)
    found = None
    with row.step(f"prune {name}", lambda error: checks.refused_well(model, before, error)):
        needed = {"data": data} if method.card.needs else {}
        found = gs.prune(model, method, pattern=pattern, density=density, **needed)
        checks.restored(model, before)
        checks.pruned_weights(model, before, found, name.rpartition(" ")[2], density)
    if found is None:
        return None
    with row.step("coverage"):
        share, left = checks.coverage(model, found)
        row.facts["share"], row.facts["left_out"] = share, left
    return found


def through_files(row: Row, name: str) -> bool:
    """Whether this variant is saved: the sparse one, and the first at 50% that was packed."""
    first = next((n for n in variants() if "50%" in n and row.passed(f"compress {n}")), None)
    return name in (SPARSE, first)


def pack(row: Row, family: Family, name: str, result: Any, place: Path) -> None:
    """Compress, compare with the masked dense model, and save what fresh processes need."""
    model, data = result.model.eval(), family.data()
    fast, wanted, ids = None, {}, None
    with row.step(f"compress {name}"):
        wanted, ids = checks.run(model, data), greedy(family, model)
        state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        fast = gs.compress(result, latency="rule")
        gaps = row.facts.setdefault("gaps", {})
        gaps[name] = checks.gap(checks.run(fast.model, data), wanted, checks.LARGEST_GAP)
        checks.gap(checks.run(fast.model, data, grad=True), wanted, checks.LARGEST_GAP)
        served = {record.name for record in fast.layers if record.kernel is not None}
        pruned = result.supports.keys()
        row.facts.setdefault("packed", {})[name] = f"{len(served & pruned)} of {len(pruned)}"
    if not row.passed(f"compress {name}") or not through_files(row, name):
        return
    with row.step(f"save {name}"):
        folder = place / family.name / name.replace(" ", "-").replace("%", "")
        gs.save(fast, folder / "packed")
        save_file({k: v.contiguous() for k, v in wanted.items()}, folder / "wanted.safetensors")
        save_file(
            {k: v.clone().contiguous() for k, v in state.items()}, folder / "state.safetensors"
        )
        if ids is not None:
            save_file({"ids": ids}, folder / "tokens.safetensors")


def greedy(family: Family, model: nn.Module) -> Any:
    """The tokens of transformers' own greedy search; None where the family does not generate."""
    if not family.decodes:
        return None
    with torch.no_grad():
        made: Any = model
        return made.generate(**family.prompt(), max_new_tokens=NEW_TOKENS, do_sample=False)
