"""Layers of a compression as rows of a page: one for each kind, or one for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import prod
from typing import Any

from gossamer.report.notes import starred
from gossamer.report.tables import human

Row = tuple[str, int, str, float, float, str, str]
"""Name, how many, shape, density, weights, what serves, what decided it."""


def layer_rows(layers: Sequence[Mapping[str, Any]], grouped: bool) -> list[Row]:
    """Grouped, layers that differ in their blocks' numbers alone share a row."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for layer in layers:
        name = starred(layer["name"]) if grouped else str(layer["name"])
        serves = layer["kernel"] or "dense"
        reason = "" if layer["kernel"] or grouped else layer["reason"]
        shape = " x ".join(str(extent) for extent in layer["shape"])
        groups.setdefault((name, shape, str(serves), str(reason)), []).append(layer)
    rows = []
    for (name, shape, serves, reason), found in groups.items():
        weights = sum(prod(layer["shape"]) for layer in found)
        kept = sum(prod(layer["shape"]) * float(layer["density"]) for layer in found)
        note = reason if grouped else str(reason or found[0].get("decided") or "")
        rows.append((name, len(found), shape, kept / max(1, weights), weights, serves, note))
    return rows


def layer_table(rows: Sequence[Row]) -> str:
    """With a last row of totals; on a narrow screen each row becomes a small paragraph."""
    weights = sum(row[4] for row in rows)
    kept = sum(row[3] * row[4] for row in rows)
    body = "".join(_row(*row) for row in rows)
    count = sum(row[1] for row in rows)
    total = (
        f"<tr class=total><td>all {count} layers</td><td></td><td></td>"
        f"<td>{_density(kept / max(1, weights))}</td><td>{human(weights)}</td><td></td></tr>"
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("layer", "layers", "shape", "density", "weights", "served by")
    )
    return (
        f"<div class=wide><table class=layers><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}{total}</tbody></table></div>"
    )


def _row(
    name: str, many: int, shape: str, density: float, weights: float, serves: str, note: str
) -> str:
    small = f'<br><small class="soft">{escape(note)}</small>' if note else ""
    return (
        f"<tr><td>{escape(name)}</td><td>{many}</td><td>{escape(shape)}</td>"
        f"<td>{_density(density)}</td><td>{human(weights)}</td><td>{escape(serves)}{small}</td></tr>"
    )


def _density(density: float) -> str:
    share = max(0.0, min(1.0, density))
    bar = f'<span class="track"><i style="width:{share:.1%}"></i></span>'
    return f"{share:.3f} {bar}"
