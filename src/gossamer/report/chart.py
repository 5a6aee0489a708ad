"""Quality against bytes as a drawing that a phone can show."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import floor, log10
from typing import Any

from gossamer.report.tables import better, human

_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 382, 16, 236


def chart(result: Mapping[str, Any]) -> str:
    """The points of the sweep, and the dense model beside them."""
    points = sorted((p["bytes"], p["quality"], p["density"]) for p in result["sweep"])
    dense = float(result["quality"]["dense"])
    qualities = [dense, *(quality for _, quality, _ in points)]
    pad = max(1e-6, (max(qualities) - min(qualities)) * 0.12)
    low, high = min(qualities) - pad, max(qualities) + pad
    widest = 1.08 * max(result["bytes"]["dense"], points[-1][0])

    def place(size: float, quality: float) -> tuple[float, float]:
        x = _LEFT + (_RIGHT - _LEFT) * size / widest
        return x, _TOP + (_BOTTOM - _TOP) * (high - quality) / (high - low)

    grid = "".join(_level(place(0, value)[1], value) for value in _ticks(low, high))
    along = "".join(_step(place(value, low)[0], value) for value in _ticks(0, widest))
    line = " ".join("{:.1f},{:.1f}".format(*place(size, quality)) for size, quality, _ in points)
    marks = "".join(
        _mark(*place(size, quality), f"{1 - density:.0%}", "var(--bar)")
        for size, quality, density in points
    )
    marks += _mark(*place(result["bytes"]["dense"], dense), "dense", "var(--soft)")
    metric = f"{result['quality']['metric']}, {better(result['quality'])} is better"
    return (
        f'<p class="soft">{escape(metric)}; each point is one sparsity</p>'
        '<svg viewBox="0 0 390 280" role="img" aria-label="quality against size">'
        f"{grid}{along}"
        f'<polyline points="{line}" fill="none" stroke="var(--bar)" stroke-width="2"/>{marks}'
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="274" text-anchor="middle">bytes of the pruned layers'
        "</text></svg>"
    )


def _mark(x: float, y: float, label: str, colour: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
        f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle" class="on">{escape(label)}</text>'
    )


def _level(y: float, value: float) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    )


def _step(x: float, value: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 4}" stroke="var(--soft)"/>'
        f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{_short(value)}</text>'
    )


def _short(value: float) -> str:
    number, _, unit = human(value).partition(" ")
    return f"{float(number):g} {unit}B" if unit else f"{float(number):g}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, about four of them."""
    rough = (high - low) / 4
    power = 10.0 ** floor(log10(rough))
    size = power * next(step for step in (1, 2, 2.5, 5, 10) if step * power >= rough)
    first = -(-low // size)
    return [(first + n) * size for n in range(8) if (first + n) * size <= high]
