"""One self-contained page: no network, no scripts; every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gossamer.report.tables import better, gain, headline, human

_STYLE = """
:root { --ink:#1a1d21; --soft:#5c6670; --line:#dfe3e8; --paper:#fff; --bar:#2f6f8f; --dense:#b7c3cc;
  --tint:#f4f7f9 }
@media (prefers-color-scheme: dark) { :root { --ink:#e8eaed; --soft:#9aa4ae; --line:#343a41;
  --paper:#15181b; --bar:#6db3d6; --dense:#55606a; --tint:#1d2226 } }
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:60rem; margin:0 auto; padding:2rem 1.25rem 4rem }
h1 { font-size:1.7rem; line-height:1.2; margin:0 0 .25rem } h2 { font-size:1.15rem; margin:2.5rem 0 .75rem }
p { margin:.4rem 0 } .soft { color:var(--soft) }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(11rem,1fr)); gap:.75rem; margin:1.5rem 0 }
.card { background:var(--tint); border:1px solid var(--line); border-radius:.6rem; padding:.8rem 1rem }
.card b { display:block; font-size:1.5rem; font-variant-numeric:tabular-nums }
.wide { overflow-x:auto } table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td { text-align:right; padding:.4rem .6rem; border-bottom:1px solid var(--line); vertical-align:top }
th:first-child,td:first-child { text-align:left; overflow-wrap:anywhere } th { color:var(--soft); font-weight:600 }
.track { background:var(--dense); height:.55rem; width:7rem; border-radius:.3rem; display:inline-block }
.track i { background:var(--bar); height:100%; display:block; border-radius:.3rem }
pre { background:var(--tint); border:1px solid var(--line); border-radius:.6rem; padding:.8rem 1rem;
  white-space:pre-wrap; overflow-wrap:anywhere; font-size:.9rem }
svg { width:100%; height:auto; max-width:44rem; min-width:34rem } svg text { fill:var(--soft); font-size:12px; paint-order:stroke; stroke:var(--paper); stroke-width:4px }
details summary { cursor:pointer }
@media (max-width:520px) { main { padding:1.25rem .9rem 3rem } th,td { padding:.35rem .35rem; font-size:.86rem }
  .track { display:none } td:first-child { min-width:9rem } }
"""


def render(result: Mapping[str, Any]) -> str:
    """The page of one compression; `result` as `gossamer compress --json` prints it."""
    title = f"{result['method']}, {result['pattern']}, {1 - result['measured_density']:.1%} zeros"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">density requested {result["requested_density"]:.4f}, measured '
        f"{result['measured_density']:.4f} over the pruned layers</p>",
        _cards(result),
        "<h2>What was gained and lost</h2>",
        table(("", "dense", "sparse", "ratio"), [list(map(escape, r)) for r in headline(result)]),
    ]
    if result.get("sweep"):
        parts += ["<h2>Quality against size</h2>", _chart(result)]
    parts += ["<h2>Layers</h2>", _layers(result["layers"]), "<h2>Notes</h2>", _notes(result)]
    parts += ["<h2>Machine</h2>", _machine(result["machine"])]
    parts += ["<h2>Command</h2>", f"<pre>{escape(str(result['command']))}</pre>"]
    return page(title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document; parts are HTML already, the title is not."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Gossamer: {escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


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
    """What the zeros alone give, first; then what the loop adds, and what to trust."""
    text = f"the speed by zeros alone, {speed['sparse']:.1f} {speed['unit']}"
    if speed.get("disturbed"):
        text += f"; machine busy: {speed['disturbed']} of {speed['repeats']} rounds disturbed"
    elif speed.get("dense_compiled"):
        text += f"; {speed['sparse'] / speed['dense']:.2f}x over plain transformers"
    return f"{gain(speed):.2f}x", text


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for layer in layers:
        share = max(0.0, min(1.0, float(layer["density"])))
        bar = f'<span class="track"><i style="width:{share:.1%}"></i></span>'
        kernel = layer["kernel"] or f"dense: {layer['reason']}"
        shape = " x ".join(str(extent) for extent in layer["shape"])
        cell = escape(str(kernel))
        if layer["kernel"] and layer.get("decided"):
            cell += f'<br><small class="soft">{escape(str(layer["decided"]))}</small>'
        rows.append([escape(layer["name"]), escape(shape), f"{share:.3f}", bar, cell])
    return table(("layer", "shape", "density", "", "kernel"), rows)


def _notes(result: Mapping[str, Any]) -> str:
    refused = [layer for layer in result["layers"] if not layer["kernel"]]
    notes = [
        f"{len(result['layers']) - len(refused)} of {len(result['layers'])} linear layers run "
        f"sparse; {len(refused)} stay dense.",
        _speed_note(result["speed"]),
        "Quality is measured on held-out text with the weights as stored, in float32 arithmetic.",
        f"Weights on disk, all layers: {human(result['bytes'].get('files', 0))}B.",
    ]
    if result.get("bits"):
        notes.append(
            f"Kept weights are integers of {result['bits']} bits. Decoding also rounds what they "
            "multiply to 8 bits, which the quality above does not include."
        )
    return "".join(f"<p>{escape(text)}</p>" for text in notes)


def _speed_note(speed: Mapping[str, Any]) -> str:
    how = f"both models in one process in turns, median of {speed['repeats']} repeats"
    if speed["unit"] != "tokens/s":
        return f"Speed: {how}."
    dense = "the dense model under plain transformers"
    loop = speed.get("loop", "transformers")
    sparse = "the sparse one in our compiled loop" if loop == "compiled" else "the sparse one too"
    return (
        f"Speed: greedy decoding with a key-value cache, batch 1, {dense}, {sparse}; {how}; the "
        "prompt is not timed."
    )


def _machine(facts: Mapping[str, Any]) -> str:
    return table(("", ""), [[escape(str(k)), escape(str(v))] for k, v in facts.items()])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _chart(result: Mapping[str, Any]) -> str:
    """Quality against bytes: the sweep's points, with the dense model as a line."""
    points = sorted((p["bytes"], p["quality"], p["density"]) for p in result["sweep"])
    dense = float(result["quality"]["dense"])
    low = min([dense, *(q for _, q, _ in points)])
    high = max([dense, *(q for _, q, _ in points)])
    pad = max(1e-6, (high - low) * 0.12)
    low, high = low - pad, high + pad
    widest = max(result["bytes"]["dense"], points[-1][0])

    def place(size: float, quality: float) -> tuple[float, float]:
        return 60 + 560 * size / widest, 20 + 240 * (high - quality) / (high - low)

    line = " ".join("{:.1f},{:.1f}".format(*place(b, q)) for b, q, _ in points)
    y = place(0, dense)[1]
    marks = "".join(
        f'<circle cx="{place(b, q)[0]:.1f}" cy="{place(b, q)[1]:.1f}" r="5" fill="var(--bar)"/>'
        f'<text x="{place(b, q)[0]:.1f}" y="{place(b, q)[1] - 8:.1f}" dx="9">'
        f"{q:.3f} at {1 - d:.0%} zeros</text>"
        for b, q, d in points
    )
    metric = escape(str(result["quality"]["metric"]))
    return (
        '<div class="wide"><svg viewBox="0 0 700 310" role="img" aria-label="quality against size">'
        f'<line x1="60" x2="620" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--dense)" stroke-dasharray="5 4"/>'
        f'<text x="620" y="{y + 16:.1f}" text-anchor="end">dense {dense:.3f} at '
        f"{human(result['bytes']['dense'])}B</text>"
        '<line x1="60" x2="620" y1="265" y2="265" stroke="var(--line)"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--bar)" stroke-width="2"/>{marks}'
        f'<text x="60" y="285">0</text><text x="620" y="285" text-anchor="end">{human(widest)}B</text>'
        f'<text x="340" y="302" text-anchor="middle">bytes of the pruned layers; up: {metric}</text></svg></div>'
    )
