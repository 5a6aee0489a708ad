"""Training runs as tables and as one self-contained page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gossamer.core.confidence import interval
from gossamer.report.html import figures, page, table
from gossamer.report.tables import human

COLOURS = ("#2f6f8f", "#c2571a", "#4b8b3b", "#8a4fa3", "#b03060", "#7a6a00", "#3f51b5", "#00796b")

Rows = list[tuple[str, ...]]


def headline(result: Mapping[str, Any]) -> Rows:
    """Rows (what, value) of one run."""
    quality, topology, flops = result["quality"], result["topology"], result["flops"]
    queries = result.get("queries")
    passes = [("forward passes in a step, without a backward", str(queries))] if queries else []
    return [
        (f"{quality['metric']} ({quality['better']} is better)", f"{quality['value']:.4f}"),
        ("loss, mean of the last tenth", f"{result['loss']['last']:.4f}"),
        ("density, first to last support", f"{topology['start_density']:.4f} to "
                                           f"{result['measured_density']:.4f}"),
        ("training FLOPs", f"{human(flops['spent'])}, {flops['ratio']:.3f}x of a dense run"),
        *passes,
        ("updates of the support", str(topology["updates"])),
        ("SAD: entries flipped by an update", f"{topology['sad_per_update']:.2%}"),
        ("SAD: first support to last", f"{topology['sad_start_to_end']:.2%}"),
        ("ITOP rate: weights ever kept", f"{topology['itop_rate']:.2%}"),
    ]  # fmt: skip


SWEEP_HEADER = ("method", "density", "steps", "FLOPs / budget", "quality", "SAD", "ITOP")


def sweep_rows(result: Mapping[str, Any]) -> Rows:
    """One row for each method and density, over seeds."""
    rows: Rows = []
    for variant in result["variants"]:
        runs = variant["runs"]
        values = [run["quality"]["value"] for run in runs]
        spent = statistics.fmean(run["flops"]["spent"] for run in runs) / result["budget_flops"]
        rows.append((
            variant["method"],
            f"{statistics.fmean(run['measured_density'] for run in runs):.4f}",
            str(variant["steps"]),
            f"{spent:.3f}",
            f"{statistics.fmean(values):.4f}"
            + (f" ± {interval(values).half:.4f}" if len(values) > 1 else ""),
            f"{statistics.fmean(run['topology']['sad_per_update'] for run in runs):.2%}",
            f"{statistics.fmean(run['topology']['itop_rate'] for run in runs):.2%}",
        ))  # fmt: skip
    return rows


def render_run(result: Mapping[str, Any]) -> str:
    """The page of one run; `result` as `gossamer train --json` prints it."""
    quality, flops = result["quality"], result["flops"]
    title = f"{result['method']} on {result['data']}, density {result['measured_density']:.3f}"
    cards = [
        (f"{quality['value']:.4f}", f"{quality['metric']}, {quality['better']} is better"),
        (f"{flops['ratio']:.3f}x", "the FLOPs of a dense training run"),
        (f"{result['topology']['itop_rate']:.1%}", "of the weights were ever kept"),
    ]
    layers = [
        [escape(x["name"]), " x ".join(map(str, x["shape"])), f"{x['density']:.4f}"]
        for x in result["layers"]
    ]
    losses = [(float(step), float(loss)) for step, loss in result["loss"]["curve"]]
    parts = [
        f"<h1>{escape(title)}</h1>", figures(cards),
        "<h2>Run</h2>", table(("", ""), [list(map(escape, row)) for row in headline(result)]),
        "<h2>Loss</h2>", chart({"loss": losses}, "step", "loss"),
        "<h2>Layers</h2>", table(("layer", "shape", "density"), layers),
        *_foot(result),
    ]  # fmt: skip
    return page(title, parts)


def render_sweep(result: Mapping[str, Any]) -> str:
    """The page of a sweep: the table, and quality against density by method."""
    title = f"{len(result['variants'])} ways to train on {result['data']}"
    lines: dict[str, list[tuple[float, float]]] = {}
    for variant in result["variants"]:
        density = statistics.fmean(run["measured_density"] for run in variant["runs"])
        mean = statistics.fmean(run["quality"]["value"] for run in variant["runs"])
        lines.setdefault(variant["method"], []).append((density, mean))
    metric, seeds = result["metric"], len(result["seeds"])
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Every run spends about {human(result["budget_flops"])} training FLOPs, '
        f"from the same {seeds} seed{'s' if seeds > 1 else ''}; intervals are 95%.</p>",
        "<h2>Comparison</h2>",
        table(SWEEP_HEADER, [list(map(escape, row)) for row in sweep_rows(result)]),
        f"<h2>{escape(metric)} against density</h2>", chart(lines, "density", metric),
        *_foot(result),
    ]  # fmt: skip
    return page(title, parts)


def _foot(result: Mapping[str, Any]) -> list[str]:
    facts = [[escape(str(k)), escape(str(v))] for k, v in result["machine"].items()]
    parts = ["<h2>Machine</h2>", table(("", ""), facts)]
    if "command" in result:
        parts += ["<h2>Command</h2>", f"<pre>{escape(str(result['command']))}</pre>"]
    return parts


def chart(lines: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Lines of (x, y) points over common axes, as SVG."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return "<p>No points.</p>"
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    wide, tall = right - left or 1.0, high - low or 1.0
    drawn = []
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [
            (60 + 540 * (x - left) / wide, 240 - 210 * (y - low) / tall) for x, y in sorted(line)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            + "".join(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
                for x, y in (placed if len(placed) < 40 else ())
            )
            + f'<text x="612" y="{34 + 16 * index}" style="fill:{colour}">{escape(name)}</text>'
        )
    return (
        '<div class="wide"><svg viewBox="0 0 720 300" role="img" '
        f'aria-label="{escape(up)} against {escape(across)}">'
        '<line x1="60" x2="600" y1="250" y2="250" stroke="var(--line)"/>'
        f'<text x="52" y="244" text-anchor="end">{low:.3g}</text>'
        f'<text x="52" y="34" text-anchor="end">{high:.3g}</text>'
        f'<text x="60" y="268">{left:.3g}</text>'
        f'<text x="600" y="268" text-anchor="end">{right:.3g}</text>'
        f'<text x="330" y="290" text-anchor="middle">{escape(across)}; up: {escape(up)}</text>'
        f"{''.join(drawn)}</svg></div>"
    )
