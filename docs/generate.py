"""Writes docs/methods/*.md from the cards and the ledger of claims, the verdicts that the package
carries, and two pages of docs/guide. Run: python docs/generate.py"""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from gossamer.claims.ledger import outcome
from gossamer.core.card import Card
from gossamer.methods import TOPICS, cards, find, summary

OUT = Path(__file__).parent / "methods"
FRONTIER = Path(__file__).parent / "guide" / "attention-frontier.md"
BENCHMARKS = Path(__file__).parent / "guide" / "benchmarks.md"
LEDGER = Path(__file__).parents[1] / "benchmarks" / "results" / "claims"
RECORDS = "../../benchmarks/results/claims"
VERDICTS = Path(__file__).parents[1] / "src" / "gossamer" / "methods" / "verdicts.json"


def page(card: Card) -> str:
    """The page of one method: the docstring of its module, its facts and the ledger's record."""
    method = find(f"{card.topic}.{card.name}")
    title, _, text = (sys.modules[method.__module__].__doc__ or "").strip().partition("\n")
    return f"""# {title.rstrip(".")}
{text}

- Name: `{card.name}`; in Python `gs.{card.topic}.{method.__name__}`
- Role: {card.role}; status: {card.status}
- Needs: {", ".join(card.needs) or "nothing: no calibration data"}
- Patterns: {", ".join(card.patterns)}

{ledger(card)}```
{usage(card)}
```
"""


def ledger(card: Card) -> str:
    """What the claim became here; nothing where it was not tried."""
    path = record_path(card)
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    kinds = found["verdicts"]
    apart = ", ".join(f"{kind}: {text}" for kind, text in kinds.items()) if len(kinds) > 1 else ""
    rows = ["| line | kind | difference | outcome |", "|---|---|---|---|"]
    for line in found["promises"]:
        difference = f"{line['mean']:+.4f} ± {line['half']:.4f}" if "mean" in line else ""
        rows.append(f"| {line['what']} | {line['kind']} | {difference} | {outcome(line)} |")
    measured = ["| measured | mean | 95% interval |", "|---|---|---|"]
    measured += [
        f"| {variant} | {value['mean']:.4f} | ± {value['ci95']:.4f} |"
        for variant, value in found["measured"].items()
    ]
    head = f"**What came out here: {found['verdict']}.**" + (f" By kind, {apart}." if apart else "")
    link = f"([record]({RECORDS}/{card.topic}/{card.name}.json))"
    parts = [
        head, f"Claimed: {found['claimed']}", f"Tried on: {found['where']} {found['seeds']['rule']}",
        "\n".join(rows), "\n".join(measured), found["remark"], link,
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n\n"


def verdicts() -> str:
    """The verdict by topic and method, as the package carries it."""
    found = {}
    for card in cards():
        path = record_path(card)
        if path.exists():
            found[f"{card.topic}.{card.name}"] = json.loads(path.read_text())["verdict"]
    return json.dumps(found, indent=1) + "\n"


def record_path(card: Card) -> Path:
    """The record of a method's claim."""
    return LEDGER / card.topic / f"{card.name}.json"


USAGE = {
    "recipe": """def train(model, trainer, part):  # part: which round, copy and steps
    with gs.sparse_training(model, optimizer, trainer, total_steps=n):
        ...  # the loop as it was

gs.train_rounds(model, NAME(density=0.1), train)""",
    "learned_mask": """with gs.sparse_training(model, optimizer, NAME(), total_steps=n):
    ...  # the loop as it was; schedules of the learning rate are made in here""",
    "replacer": """result = gs.replace_layers(model, NAME(), density=0.5)
...  # train: the optimizer is made after the layers
gs.fold_layers(model)""",
    "planner": 'gs.prune(model, NAME(), density=0.5).model.save_pretrained("out")',
    "gradient_source": """estimates = gs.EstimatedGradients(model, NAME(), total_steps=n)
for x, y in batches:
    optimizer.zero_grad()
    estimates.backward(lambda: loss(model(x), y))  # in place of loss.backward()
    optimizer.step()""",
    "layer": "layer = NAME(...)  # a torch module; its parameters are in the API reference",
    "input_scorer": """with gs.sparsify_activations(model, NAME(density=0.5), batches) as run:
    ...  # the model as it was
print(run.result)""",
    "neuron_selector": """with gs.sparsify_activations(model, NAME()) as run:
    ...  # the model as it was; a prompt first
print(run.result)""",
    "corrector": "found = gs.generate_corrected(model, NAME(), ids, 100, batches)",
    "key_scorer": """with gs.sparse_attention(model, NAME()) as run:
    ...  # the model as it was
print(run.result)""",
    "fitted key_scorer": """method = gs.calibrate_attention(model, NAME(), batches)
with gs.sparse_attention(model, method) as run:
    ...  # the model as it was""",
    "cache": """cache = gs.attention_cache(model, NAME())
ids = model.generate(ids, past_key_values=cache)
print(cache.result)""",
    "fitted cache": """method = gs.calibrate_attention(model, NAME(), batches)
cache = gs.attention_cache(model, method)
ids = model.generate(ids, past_key_values=cache)
print(cache.result)""",
    "step_attention": """grid = gs.TokenGrid(frames, height, width, text=tokens)
with gs.sparse_denoising(model, NAME(), steps=n, grid=grid) as run:
    for number in range(n):
        run.step(number)
        ...  # the step of the sampler as it was
print(run.result)""",
    "fitted step_attention": """grid = gs.TokenGrid(frames, height, width, text=tokens)
method = gs.calibrate_denoising(model, NAME(), sample, steps=n, grid=grid)
with gs.sparse_denoising(model, method, steps=n, grid=grid) as run:
    for number in range(n):
        run.step(number)
        ...  # the step of the sampler as it was
print(run.result)""",
}
"""How to run a method of each role, NAME for the method; `fitted` where it learns first."""


def usage(card: Card) -> str:
    """How to run the method: on the command line, or in and around a training loop."""
    if card.role == "topology":
        return _topology_usage(card)
    method = find(card.name)
    role = f"fitted {card.role}" if hasattr(method, "fitted") else card.role
    text = USAGE.get(role, f"gossamer compress --method {card.name} --sparsity 0.5")
    return text.replace("NAME", f"gs.{card.topic}.{method.__name__}")


def _topology_usage(card: Card) -> str:
    method = find(card.name)
    needed = [
        x.name for x in fields(method) if x.default is MISSING and x.default_factory is MISSING
    ]
    given = {"density": "density=0.1", "coupled": "coupled=gs.coupled_channels(model, batch)"}
    call = f"gs.{card.topic}.{method.__name__}({', '.join(given[name] for name in needed)})"
    loop = "    ...  # the loop as it was: loss.backward(); optimizer.step()"
    if "coupled" in needed:
        loop += "\nsmall = gs.remove_channels(model, batch).model"
    open_with = f"model, optimizer, {call}, total_steps=n"
    if "loss" in card.needs:
        return f"""with gs.sparse_training(
    {open_with}, loss=lambda: loss(model, batch)
):
{loop}"""
    return f"with gs.sparse_training({open_with}):\n{loop}"


def pages() -> dict[str, str]:
    """File name to content, the index included."""
    parts = ["# Methods\n\nWritten from the cards by `make docs`.\n"]
    for name, what in TOPICS.items():
        lines = [f"- [{x.name}]({x.name}.md): {summary(find(x.name))}\n" for x in cards(name)]
        if lines:
            parts += [f"\n## {name.capitalize()}\n\nWhat becomes sparse: {what}.\n\n", *lines]
    return {"index.md": "".join(parts), **{f"{card.name}.md": page(card) for card in cards()}}


def benchmarks() -> str:
    """The page of benchmarks, from the file beside this one."""
    return _written_by("benchmarks.py")


def frontier() -> str:
    """The page of attention's quality and cost, likewise."""
    return _written_by("frontier.py")


def _written_by(name: str) -> str:
    return str(runpy.run_path(str(Path(__file__).with_name(name)))["page"]())


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, text in pages().items():
        (OUT / name).write_text(text)
    VERDICTS.write_text(verdicts())
    BENCHMARKS.write_text(benchmarks())
    FRONTIER.write_text(frontier())
