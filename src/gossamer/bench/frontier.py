"""Suite `frontier`: quality on long prompts against what attention costs, after The Sparse Frontier.

The bundled model of symbols reads needles, chains and counts. SmolLM2-135M, where it was fetched,
reads the same kinds of task in English, and held-out text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.attention_comparison import AttentionComparison, LongTask, compare_attention
from gossamer.core.errors import UsageError
from gossamer.engine.measure.frontier import DENSE, Point, fit, means
from gossamer.testbed import symbol_model
from gossamer.testbed.long_context import (
    CommonWords,
    HeldOutText,
    Needles,
    TextTask,
    VariableTracking,
)
from gossamer.testbed.packaged import folder
from gossamer.testbed.symbols import SymbolTask

SEEDS = (0, 1, 2)
DENSITIES = (0.15, 0.3, 0.5)
"""Common densities, to which settings are interpolated."""
SYMBOL_SETTINGS = {
    "streamingllm": tuple(f"streamingllm:window={w},block=16" for w in (32, 96, 240)),
    "blocksparse": tuple(f"blocksparse:block=16,density={d}" for d in (0.1, 0.25, 0.5)),
    "verticalslash": tuple(
        f"verticalslash:verticals={n},slashes={n},near=16,last=64,block=16" for n in (18, 48, 160)
    ),
    "flexprefill": tuple(
        f"flexprefill:share={s},least=16,near=16,last=64,block=16" for s in (0.3, 0.7, 0.9)
    ),
    "anchorattention": tuple(
        f"anchorattention:theta={t},step=4,block=16" for t in (-2, 2, 6)
    ),
}  # fmt: skip
TEXT_SETTINGS = {
    "streamingllm": ("streamingllm:window=64,block=16", "streamingllm:window=256,block=16"),
    "blocksparse": tuple(f"blocksparse:block=16,density={d}" for d in (0.12, 0.25, 0.5)),
    "verticalslash": tuple(
        f"verticalslash:verticals={n},slashes={n},near=16,last=64,block=16" for n in (20, 60, 160)
    ),
    "flexprefill": tuple(
        f"flexprefill:share={s},least=16,near=16,last=64,block=16" for s in (0.4, 0.8)
    ),
    "anchorattention": ("anchorattention:theta=0,step=4,block=16",
                        "anchorattention:theta=4,step=4,block=16"),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Tasks of one model."""

    model: str
    settings: dict[str, tuple[str, ...]]
    tasks: tuple[LongTask, ...]

    def load(self) -> nn.Module:
        """The model."""
        return symbol_model() if self.model == "symbols" else smollm2()


def smollm2() -> nn.Module:
    """SmolLM2 in bfloat16."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder("smollm2"), dtype="bfloat16", local_files_only=True
    )
    found: nn.Module = model.eval()
    return found


def parts(only: str) -> list[Part]:
    """What is measured, of which `only` leaves labels that hold this text, such as `smollm2 needles`."""
    found = [Part("symbols", SYMBOL_SETTINGS, _symbol_tasks())]
    try:
        found.append(Part("smollm2", TEXT_SETTINGS, _text_tasks()))
    except (UsageError, ImportError):
        if only.startswith("smollm2"):
            raise
    chosen = []
    for part in found:
        tasks = tuple(task for task in part.tasks if only in label(part.model, task))
        chosen += [Part(part.model, part.settings, tasks)] if tasks else []
    if not chosen:
        raise UsageError(f"--only {only!r} leaves no case")
    return chosen


def label(model: str, task: LongTask) -> str:
    """One line for a case."""
    return f"{model} {task.name} {task.length} tokens"


def _symbol_tasks() -> tuple[LongTask, ...]:
    return tuple(
        SymbolTask(name, length, 2)
        for name in ("needle", "counting", "multi-hop") for length in (256, 512, 1024)
    )  # fmt: skip


def _text_tasks() -> tuple[LongTask, ...]:
    """Of 1024 tokens; fewer questions, chains and words than in the study, whose prompts are longer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("smollm2"), local_files_only=True)
    families = (VariableTracking(3, 2), CommonWords(5, 10, 1))
    return (
        HeldOutText(1024, tokenizer), TextTask(Needles(4, 1), 1024, tokenizer),
        *(TextTask(family, 1024, tokenizer) for family in families),
    )  # fmt: skip


def measure(only: str, keep: Path | None, progress: bool = True) -> AttentionComparison:
    """All parts that `only` leaves; `keep` as in `compare_attention`."""
    points: dict[tuple[object, ...], Point] = {}
    better: dict[str, str] = {}
    for part in parts(only):
        found = compare_attention(
            part.load(), part.settings, part.tasks, seeds=SEEDS, name=part.model, keep=keep,
            progress=progress,
        )  # fmt: skip
        points |= {(p.model, p.setting, p.task, p.length, p.seed): p for p in found.points}
        better |= found.better
    kept = [p for p in points.values() if p.task in better]
    return AttentionComparison(tuple(kept), better)


def record(found: AttentionComparison) -> dict[str, Any]:
    """Means over seeds with each seed's score, tables at common densities, and fits by task."""
    rows = []
    for point in means(found.points):
        row = asdict(point)
        del row["seed"]
        row["scores"] = [
            p.score for p in found.points
            if (p.model, p.setting, p.task, p.length)
            == (point.model, point.setting, point.task, point.length)
        ]  # fmt: skip
        rows.append(row)
    return {
        "better": dict(found.better),
        "seeds": list(SEEDS),
        "points": rows,
        "at": {f"{density:g}": found.at(density) for density in DENSITIES},
        "laws": laws(found.points),
    }


def laws(points: Iterable[Point]) -> list[dict[str, Any]]:
    """A fit of each task and method over lengths and densities of the model of symbols."""
    averaged = [p for p in means(points) if p.model == "symbols"]
    found = []
    for task in dict.fromkeys(p.task for p in averaged):
        for method in dict.fromkeys(p.method for p in averaged if p.method != DENSE):
            own = [p for p in averaged if p.task == task and p.method in (DENSE, method)]
            if len(own) >= 8:
                found.append({"task": task, "method": method, **asdict(fit(own))})
    return found


def table(found: AttentionComparison) -> Sequence[tuple[str, ...]]:
    """Rows of the terminal: task, method, and the score at each common density."""
    by_row: dict[tuple[str, str], list[str]] = {}
    for density in DENSITIES:
        for row in found.at(density):
            key = (f"{row['task']}, {row['length']} tokens, {row['model']}", row["method"])
            by_row.setdefault(key, []).append("" if row["value"] is None else f"{row['value']:.3f}")
    return [(*key, *cells) for key, cells in by_row.items()]
