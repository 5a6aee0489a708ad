"""The record of a sweep, benchmarks/results/sweep.json, and the page that shows it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rows import Row

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "sweep.json"
PAGE = ROOT / "docs" / "guide" / "model-families.md"
SPARSE = "magnitude 90%"
PACKAGES = ("torch", "transformers", "diffusers", "timm")
METHODS = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "magnitude": "Magnitude"}
TITLES = {
    "text decoder": "Text decoders",
    "experts": "Mixtures of experts",
    "state space": "State spaces and their hybrids",
    "text encoder": "Text encoders",
    "encoder-decoder": "Encoder-decoders",
    "vision": "Vision",
    "speech": "Speech",
    "multimodal": "Text and images",
    "time series": "Time series",
    "torch.nn": "Modules of torch.nn",
    "timm": "timm",
    "diffusers": "diffusers",
}
USUAL = {
    "an embedding": "embeddings",
    "an output head": "output head",
    "a router": "router",
    "a depthwise": "depthwise convolutions",
    "by its shape": "vectors and tables",
}
"""Reasons that name a kind better than its class does, by their first words."""
INTRODUCTION = """# Model families

Which models Gossamer prunes, packs, saves and gives back. Each row is one family: a small instance
with random weights, sent along the whole path on the machine named below. `make sweep` runs it
again and writes this page.

The path: prune by SparseGPT, Wanda and Magnitude at 50% and at 2:4, and by Magnitude at 90%.
Compress each result and compare its outputs with those of the masked dense model. Save two of
them. Load them in a fresh process, compare again, and generate text where the model does. Export
them, and read the export in a process without Gossamer. The sweep counts zeros in the weights
themselves. It also checks that all other weights keep their bits, and that training flags and
hooks are as they were. Wanda's choice in two linear layers is compared with a plain computation over the whole model.

- **pruned**: the share of the model's matrix weights that `gs.prune` takes by default. Embeddings
  and output heads count as matrices.
- **methods**: how many of the seven prunings were done. A number below seven has its reason under
  [Refused](#refused).
- **packed**: how many layers run behind a sparse kernel at 90%, of those that were pruned.
- **gap**: the largest difference between packed and masked dense outputs, in float32, over the
  largest output. More than 1e-4 counts as a fault.
- **load**: the outputs of the loaded model, compared in a fresh process. Models of transformers
  are also read by `from_pretrained`, which must fail where Gossamer is absent.
- **export**: the weights read without Gossamer, which must have the bits of the masked dense ones,
  and the outputs.
- **generate**: greedy tokens of the loaded model by transformers' loop, and by `gs.generate` after
  the plus sign. Both must be those of the masked dense model.
- **left out**: the kinds of matrices that stay dense, with their share. The reasons are under
  [Left out](#left-out).
"""


def record(rows: Iterable[Row]) -> dict[str, Any]:
    """What is written down: versions, processor, and the outcome of every step."""
    from gossamer.ops import _dispatch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    kept = ("name", "kind", "steps", "facts")
    return {
        "versions": versions,
        "processor": _dispatch.processor(),
        "kernels": _dispatch.isa(),
        "rows": [{key: asdict(row)[key] for key in kept} for row in rows],
    }


def write(made: dict[str, Any]) -> None:
    """Write the record, one row a line, and the page."""
    rows = ",\n".join(json.dumps(row) for row in made["rows"])
    head = json.dumps({k: v for k, v in made.items() if k != "rows"}, indent=1)
    RECORD.write_text(f'{head.removesuffix(chr(10) + "}")},\n "rows": [\n{rows}\n]\n}}\n')
    PAGE.write_text(render(made))


def read() -> list[Row]:
    """The rows of the record on disk."""
    return [Row(**row) for row in json.loads(RECORD.read_text())["rows"]]


def render(made: dict[str, Any]) -> str:
    """The whole page."""
    rows = [Row(**row) for row in made["rows"]]
    done = [row for row in rows if not row.steps.get("build", "").startswith("skipped")]
    whole, bad = sum(row.whole() for row in done), [row for row in done if row.faults()]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    cpu = made["processor"]
    cpu = cpu["cpu"] if isinstance(cpu, dict) else cpu
    told = f"Run with {versions}, on {cpu} ({made['kernels']} kernels)."
    count = f"**{whole} of {len(done)} families go the whole path.**"
    parts = [INTRODUCTION, f"{told} {count}\n"]
    for kind, title in TITLES.items():
        of_kind = [row for row in done if row.kind == kind]
        if of_kind:
            parts.append(f"## {title}\n\n{table(of_kind)}")
    if bad:
        parts.append(
            "## Faults\n\n" + "".join(f"- {line}\n" for line in notes(bad, "CRASH", "WRONG"))
        )
    parts.append("## Refused\n\n" + "".join(f"- {line}\n" for line in notes(done, "refused")))
    parts.append("## Left out\n\n" + "".join(f"- {line}\n" for line in reasons(done)))
    return "\n".join(parts)


def table(rows: list[Row]) -> str:
    """The rows of one kind."""
    columns = (
        "family",
        "class",
        "pruned",
        "methods",
        "packed",
        "gap",
        "load",
        "export",
        "generate",
    )
    lines = [f"| {' | '.join(columns)} | left out |\n", "|---" * (len(columns) + 1) + "|\n"]
    for row in rows:
        share = row.facts.get("share")
        cells = [
            row.name, row.facts.get("model", "–"), "–" if share is None else f"{share:.0%}",
            methods(row), row.facts.get("packed", {}).get(SPARSE, "–"), largest_gap(row),
            outcome(row, "load", "from_pretrained", "elsewhere"), outcome(row, "export", "plain"), generates(row), left_out(row),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def methods(row: Row) -> str:
    """How many of the prunings were done."""
    tried = [outcome for step, outcome in row.steps.items() if step.startswith("prune ")]
    return f"{sum(outcome == 'ok' for outcome in tried)} of {len(tried)}" if tried else "–"


def largest_gap(row: Row) -> str:
    """Over all prunings that were compressed."""
    told, gap = outcome(row, "compress"), row.facts.get("gap")
    return f"{gap:.0e}" if told == "ok" and gap is not None else told


def outcome(row: Row, *kinds: str) -> str:
    """One word for all steps of these kinds."""
    found = [outcome for step, outcome in row.steps.items() if step.partition(" ")[0] in kinds]
    if not found:
        return "–"
    for start, word in (("CRASH", "**fault**"), ("WRONG", "**fault**"), ("refused", "refused")):
        if any(each.startswith(start) for each in found):
            return word
    return "ok"


def generates(row: Row) -> str:
    """By transformers' loop, and by `gs.generate` where it was tried."""
    own = outcome(row, "gs.generate")
    return outcome(row, "generate") + ("" if own == "–" else f" + {own}")


def left_out(row: Row) -> str:
    """What was left out, the largest shares first; less than half a percent is not shown."""
    shares: dict[str, float] = {}
    for kind, why in row.facts.get("left_out", {}).items():
        for reason, share in why.items():
            name = next((name for start, name in USUAL.items() if reason.startswith(start)), kind)
            shares[name] = shares.get(name, 0.0) + share
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.005) or "–"


def notes(rows: list[Row], *starts: str) -> list[str]:
    """Each message once, with the steps and the families that met it."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        steps: dict[tuple[str, str], list[str]] = {}
        for step, told in row.steps.items():
            if told.startswith(starts):
                kind, _, variant = step.partition(" ")
                message = told.partition(": ")[2].replace(row.facts.get("model", "\0"), "the model")
                steps.setdefault((kind, message), []).append(variant)
        for (kind, message), variants in steps.items():
            tried = sum(step.startswith(f"{kind} ") for step in row.steps)
            which = (
                "" if len(variants) == tried or not any(variants) else f" ({', '.join(variants)})"
            )
            found.setdefault((kind + which, message), []).append(row.name)
    return [f"{', '.join(names)}: {what}: {told}" for (what, told), names in found.items()]


def reasons(rows: list[Row]) -> list[str]:
    """Each reason to leave matrices out, with the kinds and the families."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for kind, why in row.facts.get("left_out", {}).items():
            for reason in why:
                usual = any(reason.startswith(start) for start in USUAL)
                told = reason if usual else f"{kind}: {reason}"
                found.setdefault(told, {})[row.name] = None
    return [f"{why} ({few(list(names))})" for why, names in sorted(found.items())]


def few(names: list[str]) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
