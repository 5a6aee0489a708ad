"""One self-contained page: no network, no scripts; every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gossamer.report.chart import chart
from gossamer.report.layers import layer_rows, layer_table
from gossamer.report.notes import coverage_notes, layer_notes, left_out_groups, notes, title
from gossamer.report.style import STYLE
from gossamer.report.tables import better, gain, headline, human

_LISTED = 12
"""Kinds of left-out weights above which the list is folded."""


def render(result: Mapping[str, Any]) -> str:
    """The page of one compression; `result` as `gossamer compress --json` prints it."""
    name = str(result.get("model") or "Compressed model")
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{escape(title({**result, "model": ""}))}; density requested '
        f"{result['requested_density']:.4f}, measured {result['measured_density']:.4f} over the "
        "pruned layers</p>",
        _cards(result),
        "<h2>What was gained and lost</h2>",
        table(("", "dense", "sparse", "ratio"), [list(map(escape, r)) for r in headline(result)]),
    ]
    if result.get("sweep"):
        parts += ["<h2>Quality against size</h2>", chart(result)]
    parts += _coverage((result.get("coverage") or {}).get("pruned") or {})
    parts += ["<h2>Layers</h2>", *paragraphs(layer_notes(result["layers"]))]
    parts += [layer_table(layer_rows(result["layers"], grouped=True))]
    parts += [_folded(f"All {len(result['layers'])} layers", _every(result["layers"]))]
    parts += ["<h2>Notes</h2>", *paragraphs(_notes(result))]
    parts += ["<h2>Machine</h2>", _machine(result["machine"])]
    if result.get("command"):
        parts += ["<h2>Command</h2>", f"<pre>{escape(str(result['command']))}</pre>"]
    return page(title(result), parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document; parts are HTML already, the title is not."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Gossamer: {escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def paragraphs(lines: Sequence[str]) -> list[str]:
    """Each line as a paragraph."""
    return [f"<p>{escape(line)}</p>" for line in lines]


def _cards(result: Mapping[str, Any]) -> str:
    quality, size, speed = result["quality"], result["bytes"], result["speed"]
    cards = [
        (f"{size['sparse'] / size['dense']:.2f}x", "the bytes of the pruned layers"),
        speed_card(speed),
        (
            f"{quality['sparse'] - quality['dense']:+.4f}",
            f"{quality['metric']}, {better(quality)} is better",
        ),
    ]
    return figures(cards)


def figures(cards: Sequence[tuple[str, str]]) -> str:
    """Large figures with what they are below, side by side."""
    inner = "".join(
        f'<div class="card"><b>{escape(figure)}</b><span class="soft">{escape(text)}</span></div>'
        for figure, text in cards
    )
    return f'<div class="cards">{inner}</div>'


def speed_card(speed: Mapping[str, Any]) -> tuple[str, str]:
    """What sparsity alone gives, first; then what the loop adds, and what to trust."""
    text = f"the speed from sparsity alone, {speed['sparse']:.1f} {speed['unit']}"
    if speed.get("disturbed"):
        text += f"; machine busy: {speed['disturbed']} of {speed['repeats']} rounds disturbed"
    elif speed.get("dense_compiled"):
        text += f"; {speed['sparse'] / speed['dense']:.2f}x over plain transformers"
    return f"{gain(speed):.2f}x", text


def _coverage(coverage: Mapping[str, Any]) -> list[str]:
    """What share of the model was reached, as a bar, and what was left alone."""
    lines = coverage_notes(coverage)
    if not lines:
        return []
    total = coverage["total"]
    zeros = total - coverage["nonzero"]
    kept = max(0, coverage["pruned"] - zeros)
    shares = [
        ("zero", zeros / total, "var(--bar)"),
        ("kept in pruned layers", kept / total, "var(--mid)"),
        ("left alone", max(0.0, 1 - (zeros + kept) / total), "var(--dense)"),
    ]
    bar = "".join(f'<i style="width:{s:.2%};background:{c}"></i>' for _, s, c in shares)
    legend = "".join(
        f'<span><i style="background:{c}"></i>{escape(name)} {s:.1%}</span>'
        for name, s, c in shares
    )
    rows = [
        [escape(name), escape(f"{kind}: {reason}"), str(many), human(count)]
        for name, kind, reason, many, count in left_out_groups(coverage["left_out"])
    ]
    listed = table(("left alone", "why", "tensors", "weights"), rows, "left")
    found = ["<h2>Coverage</h2>", f"<p>{escape(lines[0])}</p>",
             f'<div class="shares">{bar}</div><p class="legend soft">{legend}</p>']  # fmt: skip
    if rows:
        found.append(
            listed if len(rows) <= _LISTED else _folded(f"{len(rows)} kinds left alone", listed)
        )
    return found


def _folded(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _every(layers: Sequence[Mapping[str, Any]]) -> str:
    return layer_table(layer_rows(layers, grouped=False))


def _notes(result: Mapping[str, Any]) -> list[str]:
    said = [*coverage_notes((result.get("coverage") or {}).get("pruned") or {}),
            *layer_notes(result["layers"])]  # fmt: skip
    lines = [line for line in notes(result) if line not in said]
    lines.append(
        "Quality is measured on held-out text with the weights as stored, in float32 arithmetic."
    )
    if result.get("bits"):
        lines.append(
            f"Kept weights are integers of {result['bits']} bits. Decoding also rounds what they "
            "multiply to 8 bits, which the quality above does not include."
        )
    return lines


def _machine(facts: Mapping[str, Any]) -> str:
    return table(("", ""), [[escape(str(k)), escape(str(v))] for k, v in facts.items()])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
