"""Quality over what attention costs, as drawings with the Pareto front, and the tables behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gossamer.report.html import page, paragraphs, table
from gossamer.report.tables import human

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 382, 16, 236
_COLOURS = ("#2f6f8f", "#c0653a", "#5d8a3a", "#7d5ba6", "#b5495b", "#8a7a2f", "#3a8a80", "#666c9e")
DENSE = "dense"


def frontier_page(title: str, panels: Sequence[Mapping[str, Any]]) -> str:
    """A self-contained page.

    panels: one for each task and length: `title`, `better`, `points` as mappings with `model`,
    `method`, `setting`, `score`, `density`, `flops`, `indexing`, `decode_bytes` and `seconds`, and
    `front`, the places in `points` of the Pareto front.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += paragraphs(
        [
            "Operations are of the whole prefill: linear layers, chosen pairs, and the choice. A "
            "line joins the settings that no other beats in operations without losing quality."
        ]
    )
    for panel in panels:
        parts += [f"<h2>{escape(panel['title'])}</h2>", drawing(panel), _table(panel)]
    return page(title, parts)


def drawing(panel: Mapping[str, Any], name: str = "flops", what: str = "operations") -> str:
    """One panel as SVG: score over a cost, on a logarithmic scale, one colour for each method.

    The front belongs to the operations, and is drawn over those alone.
    """
    points = panel["points"]
    costs, scores = [float(p[name]) for p in points], [float(p["score"]) for p in points]
    pad = max(1e-6, 0.08 * (max(scores) - min(scores)))
    low, high = min(scores) - pad, max(scores) + pad
    first, last = math.log(min(costs) / 1.03), math.log(max(costs) * 1.03)

    def place(cost: float, score: float) -> tuple[float, float]:
        x = _LEFT + (_RIGHT - _LEFT) * (math.log(cost) - first) / (last - first)
        return x, _TOP + (_BOTTOM - _TOP) * (high - score) / (high - low)

    colours = _colours(points)
    marks = "".join(
        _mark(*place(cost, score), colours[_group(p)], f"{p['model']}, {p['setting']}: {score:.3f}")
        for p, cost, score in zip(points, costs, scores, strict=True)
    )
    front = " ".join("{:.1f},{:.1f}".format(*place(costs[i], scores[i])) for i in panel["front"])
    front = front if name == "flops" else ""
    levels = "".join(
        _level(place(min(costs), low + share * (high - low))[1], low + share * (high - low))
        for share in (0.1, 0.5, 0.9)
    )
    ticks = "".join(
        _tick(place(cost, low)[0], cost)
        for cost in (min(costs), math.sqrt(min(costs) * max(costs)), max(costs))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 390 {300 + 16 * len(colours)}" '
        f'role="img" aria-label="{escape(panel["title"])}">{levels}{ticks}'
        f'<polyline points="{front}" fill="none" stroke="#888" stroke-width="1.5"/>{marks}'
        f'<text x="{_LEFT}" y="12" class="on">{escape(panel["title"])}, {panel["better"]} is '
        f'better</text><text x="{(_LEFT + _RIGHT) / 2}" y="274" text-anchor="middle">{what}</text>'
        f"{_legend(colours)}</svg>"
    )


def sheet(panels: Sequence[Mapping[str, Any]], columns: int = 2) -> str:
    """All panels as one SVG file that needs no style from elsewhere."""
    pictures = [drawing(panel) for panel in panels]
    heights = [300 + 16 * len(_colours(panel["points"])) for panel in panels]
    height, inner = max(heights), []
    for index, picture in enumerate(pictures):
        x, y = 400 * (index % columns), height * (index // columns)
        sized = f'<svg x="{x}" y="{y}" width="390" height="{heights[index]}" '
        inner.append(picture.replace('<svg xmlns="http://www.w3.org/2000/svg" ', sized, 1))
    width, whole = 400 * min(columns, len(panels)), height * -(-len(panels) // columns)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" font-size="11" '
        f'font-family="sans-serif" fill="#5c6670"><rect width="{width}" height="{whole}" '
        f'fill="#ffffff"/>{"".join(inner)}</svg>\n'
    )


def _group(point: Mapping[str, Any]) -> tuple[str, str]:
    return str(point["model"]), str(point["method"])


def _colours(points: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """A colour for each model and method; grey for dense."""
    groups = list(dict.fromkeys(_group(p) for p in points))
    chosen = [group for group in groups if group[1] != DENSE]
    colours = {group: _COLOURS[index % len(_COLOURS)] for index, group in enumerate(chosen)}
    return {group: colours.get(group, "#333333") for group in groups}


def _mark(x: float, y: float, colour: str, title: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.8">'
        f"<title>{escape(title)}</title></circle>"
    )


def _level(y: float, value: float) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dfe3e8"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    )


def _tick(x: float, cost: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 4}" stroke="#888"/>'
        f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{cost:.2g}</text>'
    )


def _legend(colours: Mapping[tuple[str, str], str]) -> str:
    several = len({model for model, _ in colours}) > 1
    lines = []
    for index, ((model, method), colour) in enumerate(colours.items()):
        y = 294 + 16 * index
        name = f"{method}, {model}" if several else method
        lines.append(
            f'<circle cx="{_LEFT + 4}" cy="{y - 4}" r="4" fill="{colour}"/>'
            f'<text x="{_LEFT + 14}" y="{y}">{escape(name)}</text>'
        )
    return "".join(lines)


def _table(panel: Mapping[str, Any]) -> str:
    head = ("setting", "density", "score", "operations", "of them choosing", "decode bytes", "s")
    rows = [
        [
            escape(f"{p['model']}, {p['setting']}"), f"{p['density']:.3f}", f"{p['score']:.4f}",
            f"{p['flops']:.3g}", f"{p['indexing']:.3g}", human(p["decode_bytes"]),
            f"{p['seconds']:.2f}",
        ]
        for p in panel["points"]
    ]  # fmt: skip
    return table(head, rows)
