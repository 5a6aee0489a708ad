"""The page docs/guide/attention-frontier.md, from attention_frontier.json and the record of the bundled
model of symbols; `generate.py` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "attention_frontier.json"
SYMBOLS = ROOT / "src" / "gossamer" / "testbed" / "data" / "symbols"
Row = dict[str, Any]


def page() -> str:
    """The whole page."""
    record = json.loads(RECORD.read_text())
    return _TEXT.format(
        models=_models(), scores="\n\n".join(_scores(record)), costs=_costs(record),
        laws=_laws(record), seeds=len(record["seeds"]),
    )  # fmt: skip


def _models() -> str:
    quality = json.loads((SYMBOLS / "train.json").read_text())["quality"]
    lines = ["| task | 512 symbols | 1024 symbols |", "|---|---|---|"]
    lines += [
        f"| {task} | {quality[f'{task} 512']:.3f} | {quality[f'{task} 1024']:.3f} |"
        for task in ("needle", "multi-hop", "counting")
    ]
    return "\n".join(lines)


def _scores(record: Row) -> list[str]:
    """A table for each model, task and length: methods by density, the dense score beside."""
    densities = list(record["at"])
    dense = {_case(p): p["score"] for p in record["points"] if p["method"] == "dense"}
    tables = []
    for model in dict.fromkeys(p["model"] for p in record["points"]):
        head = " | ".join(f"at density {density}" for density in densities)
        lines = [
            f"| {model} | method | dense | {head} |",
            "|---|---|---|" + "---|" * len(densities),
        ]
        rows: dict[tuple[Any, ...], list[str]] = {}
        for density in densities:
            for row in record["at"][density]:
                if row["model"] == model:
                    value = "" if row["value"] is None else f"{row['value']:.3f}"
                    rows.setdefault((*_case(row), row["method"]), []).append(value)
        for (name, task, length, method), values in rows.items():
            lines.append(
                f"| {task}, {length} tokens | {method} | {dense[name, task, length]:.3f} | "
                f"{' | '.join(values)} |"
            )
        tables.append("\n".join(lines))
    return tables


def _case(row: Row) -> tuple[Any, ...]:
    return row["model"], row["task"], row["length"]


def _costs(record: Row) -> str:
    """Every setting on the longest prompts of one task of each model."""
    lines = [
        "| model | setting | density | prefill operations | of them choosing | decode bytes | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(p["model"] for p in record["points"]):
        own = [p for p in record["points"] if p["model"] == model]
        first = own[0]["task"]
        longest = max(p["length"] for p in own)
        lines += [
            f"| {model} | `{p['setting']}` | {p['density']:.3f} | "
            f"{p['linear'] + p['attention'] + p['indexing']:.3g} | {p['indexing']:.2g} | "
            f"{p['decode_bytes']:.3g} | {p['seconds']:.2f} |"
            for p in own if (p["task"], p["length"]) == (first, longest)
        ]  # fmt: skip
    return "\n".join(lines)


def _laws(record: Row) -> str:
    lines = [
        "| task | method | log n | log 1/(1 - s) | residual | held-out residual | "
        "spread of held-out |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {law['task']} | {law['method']} | {law['length']:+.2f} | "
        f"{law['sparsity']:+.2f} | {law['residual']:.3f} | {law['held_out_residual']:.3f} | "
        f"{law['spread']:.3f} |"
        for law in record["laws"]
    ]
    return "\n".join(lines)


_TEXT = """# The sparse frontier

How much of attention can a task do without, and what does that save? This page follows The Sparse Frontier (2025): tasks on long prompts, methods at equal measured density, and the whole cost of a prompt. The tables are written from [attention_frontier.json](../../benchmarks/results/attention_frontier.json) by `make docs`. `gossamer bench --suite frontier --out FILE` measures it anew.

```python
import gossamer as gs
from gossamer.testbed import symbol_model
from gossamer.testbed.symbols import SymbolTask

settings = [f"blocksparse:block=16,density={{x}}" for x in (0.2, 0.5)]
methods, tasks = {{"blocksparse": settings}}, [SymbolTask("needle")]
found = gs.compare_attention(symbol_model(), methods, tasks)
print(found.at(0.3))
found.save("frontier.html")
```

## The tasks

`gossamer.testbed.long_context` makes eight of the study's nine families at any length, for any tokenizer, filled to 95 to 100%. Three follow RULER: needles, variable tracking and common words. Three are about a story: retrieval, multi-hop and filtering. The study's three question sets, SQuAD, QuALITY and TOEFL, are not bundled. Two families on Python's documentation stand in for them, an answer in a passage and a choice among four; the third is absent. Scores are exact match, intersection over union, and F1.

## The model of symbols

A real small model hardly counts or follows chains even with dense attention. So the library carries a Llama of 0.9 million parameters with grouped queries, trained on a language of symbols. A prompt is noise with statements `SET name value`, links `SET name other` and counted words; questions stand at its end. `python -m gossamer.testbed.train_symbols` makes the model anew. The shares of right answers, dense:

{models}

## Scores at equal density

Means over {seeds} seeds. Between measured settings scores are interpolated on a logarithmic scale of density, with dense as the upper end; an empty cell lies outside of what was measured. Where the dense score is low, the row says little about the method. Held-out text is in bits per byte, lower is better; all others are shares, higher is better. SmolLM2's variable tracking and common words are of one seed: it hardly does either with dense attention.

Methods that look at the last queries keep needles at densities where fixed windows and pooled blocks lose them. Chains need keys in the middle of the prompt too, and every method loses there first.

{scores}

![Scores over operations of the prefill, with the Pareto front](../images/attention-frontier.svg)

## What it costs

Operations of one prompt: linear layers, chosen pairs and the choice. Bytes are what one new token reads behind the prompt: weights, keys and values. The methods of this page choose pairs of prompts, so decoding reads all keys. Seconds are processor time of one thread on a machine that others used.

{costs}

## A fit over lengths and densities

logit(score) = constant + a log N + b log n + c log 1/(1 - s), for each task and method, over three lengths of prompts of the model of symbols. N does not vary with one model, so a is not fitted here. The longest prompts and the lowest tenth of densities are held out. The form is ours: the paper's abstract speaks of scaling laws, whose form was not confirmed. A held-out residual near the spread means that the fit predicts no better than a constant.

{laws}
"""
