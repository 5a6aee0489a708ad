"""Methods of attention beside each other: quality on long prompts against what they cost."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from gossamer.api_attention import sparse_attention
from gossamer.core.attention import AttentionCall
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.files import write_whole
from gossamer.engine.inputs.counting import full_layout
from gossamer.engine.inputs.protocols import PairChooser
from gossamer.engine.inputs.tally import AttentionResult
from gossamer.engine.measure.frontier import DENSE, Point, at_density, means, pareto
from gossamer.engine.progress import track
from gossamer.ops.attention import Layout
from gossamer.report.frontier import frontier_page, sheet


class LongTask(Protocol):
    """A task on long prompts; `gossamer.testbed.long_context` has some."""

    @property
    def name(self) -> str: ...
    @property
    def length(self) -> int:
        """Tokens of a prompt, about."""
        ...

    @property
    def better(self) -> str:
        """`higher` or `lower`, of the score."""
        ...

    def score(self, reader: Any, seed: int) -> float:
        """Of the prompts of a seed, which `reader.read(ids)` reads; see `Reader`."""
        ...


class Reader:
    """Reads prompts by a method's attention and counts what that costs; the rest runs dense."""

    def __init__(self, model: nn.Module, method: PairChooser | str) -> None:
        self._model: Any = model
        self._method = method
        self._cache: Any = None
        self.results: list[AttentionResult] = []
        self.tokens = self.prompts = 0
        self.seconds = 0.0

    @torch.no_grad()
    def read(self, ids: Tensor, every: bool = False) -> Tensor:
        """Logits of the last place, or of every one, behind a new prompt (batch, tokens)."""
        with sparse_attention(self._model, self._method, dense_below=0) as run:
            start = time.process_time()
            output = self._model(ids, use_cache=True, logits_to_keep=0 if every else 1)
            self.seconds += time.process_time() - start
        self._cache = output.past_key_values
        self.results.append(run.result)
        self.prompts += ids.shape[0]
        self.tokens += ids.numel()
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def go_on(self, ids: Tensor) -> Tensor:
        """Logits of the last place behind further tokens (batch, tokens), attended densely."""
        output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        logits: Tensor = output.logits
        return logits


class Everything:
    """Every pair that may be attended, as a method: the dense baseline in our executor."""

    card: ClassVar[Card] = Card(DENSE, "attention", "key_scorer", (), ("block",), 2017,
                                "https://arxiv.org/abs/1706.03762", "stable")  # fmt: skip

    def layout(self, call: AttentionCall) -> Layout:
        """All tiles."""
        return full_layout(call)

    def __repr__(self) -> str:
        return DENSE


@dataclass(frozen=True, repr=False)
class AttentionComparison:
    """Scores and costs of every method, setting, task and seed.

    Attributes
    ----------
    points : tuple of Point
        One for each seed.
    better : dict
        `higher` or `lower`, by task.
    """

    points: tuple[Point, ...]
    better: Mapping[str, str]

    def at(self, density: float, value: str = "score") -> list[dict[str, Any]]:
        """Scores, or another figure of a point, of every method at one density.

        One row for each task, length, model and method, with `value`. Between measured settings it
        is interpolated; None where a method was not measured on both sides of the density. The
        dense point is the upper end of every method.
        """
        rows = []
        for (task, length), points in self._by_task().items():
            groups = dict.fromkeys((p.model, p.method) for p in points if p.method != DENSE)
            for model, method in groups:
                own = [p for p in points if p.model == model and p.method in (DENSE, method)]
                found = at_density(own, density, lambda point: float(getattr(point, value)))
                rows.append({"task": task, "length": length, "model": model, "method": method,
                             "value": found})  # fmt: skip
        return rows

    def front(self, task: str, length: int) -> list[Point]:
        """The settings that no other beats in operations without losing quality, of all models."""
        points = self._by_task()[task, length]
        return pareto(points, lambda point: point.flops, self.better[task])

    def _by_task(self) -> dict[tuple[str, int], list[Point]]:
        """Means over seeds, by task and length."""
        found: dict[tuple[str, int], list[Point]] = {}
        for point in means(self.points):
            found.setdefault((point.task, point.length), []).append(point)
        return found

    def panels(self) -> list[dict[str, Any]]:
        """What a picture of each task and length shows, as plain data."""
        found = []
        for (task, length), points in self._by_task().items():
            front = self.front(task, length)
            found.append({
                "title": f"{task}, {length} tokens", "better": self.better[task],
                "points": [{**asdict(point), "flops": point.flops} for point in points],
                "front": [points.index(point) for point in front],
            })  # fmt: skip
        return found

    def save(self, path: Path | str) -> None:
        """Write a page with tables and pictures (.html), the pictures (.svg) or the points (.json)."""
        texts = {
            ".json": lambda: _as_json(self.points), ".svg": lambda: sheet(self.panels()),
            ".html": lambda: frontier_page("Attention: quality and cost", self.panels()),
        }  # fmt: skip
        place = Path(path)
        if place.suffix not in texts:
            raise UsageError(f"{path}: a comparison is saved as .html, .svg or .json")
        text = texts[place.suffix]()
        write_whole(place, lambda temporary: temporary.write_text(text))

    def __str__(self) -> str:
        """A line for each task and method."""
        lines = []
        for (task, length), points in self._by_task().items():
            lines.append(f"{task}, {length} tokens")
            lines += [
                f"  {p.model}, {p.setting}: {p.score:.4f} at density {p.density:.3f}, {p.flops:.3g} operations"
                for p in points
            ]
        return "\n".join(lines)

    __repr__ = __str__


def compare_attention(
    model: nn.Module,
    methods: Mapping[str, Sequence[PairChooser | str]],
    tasks: Sequence[LongTask],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    name: str = "model",
    keep: Path | str | None = None,
    progress: bool = False,
) -> AttentionComparison:
    """Compare methods of attention on long prompts, at measured densities and costs.

    Every setting reads the same prompts as dense attention does. What follows a prompt is attended
    densely.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, as for `sparse_attention`.
    methods : mapping of str to sequence
        By name, the settings of each method, such as `["blocksparse:density=0.3"]`.
    tasks : sequence of LongTask
        Such as those of `gossamer.testbed.long_context`.
    seeds : sequence of int
        Of the tasks' prompts.
    name : str
        Of the model, in the points.
    keep : path, optional
        A .json file that is written after every prompt, so that a stopped run goes on: what it
        holds is not measured again.
    progress : bool
        Show on stderr how far it is.

    Returns
    -------
    AttentionComparison
        With a point for each prompt, the dense baseline included.

    Raises
    ------
    UsageError
        Where no task or no setting is given, or the model cannot be served.

    Examples
    --------
    >>> import gossamer as gs
    >>> from gossamer.testbed import symbol_model
    >>> from gossamer.testbed.symbols import SymbolTask
    >>> found = gs.compare_attention(
    ...     symbol_model(), {"window": ["streamingllm:window=32,block=16"]},
    ...     [SymbolTask("needle", 128, prompts=2)], seeds=[0],
    ... )
    >>> [point.setting for point in found.points]
    ['dense', 'streamingllm:window=32,block=16']
    """
    if not tasks or not seeds or not any(methods.values()):
        raise UsageError("give one task, one seed and one setting of a method at least")
    settings: list[tuple[str, str, PairChooser | str]] = [(DENSE, DENSE, Everything())]
    settings += [(method, str(one), one) for method, many in methods.items() for one in many]
    kept = None if keep is None else Path(keep)
    points = _kept(kept)
    done = {_key(point) for point in points}
    wanted = [
        (task, seed, method, setting, chooser)
        for task in tasks for seed in seeds for method, setting, chooser in settings
        if (name, setting, task.name, task.length, seed) not in done
    ]  # fmt: skip
    with track(len(wanted), progress, "comparing attention") as step:
        for task, seed, method, setting, chooser in wanted:
            step(f"{task.name}, {task.length} tokens, {setting}", 0)
            points.append(_measured(model, name, (method, setting, chooser), task, seed))
            if kept is not None:
                _write(kept, points)
            step(f"{task.name}, {task.length} tokens, {setting}")
    return AttentionComparison(tuple(points), {task.name: task.better for task in tasks})


def _measured(
    model: nn.Module, name: str, one: tuple[str, str, PairChooser | str], task: LongTask, seed: int
) -> Point:
    """The point of one setting on the prompts of one seed."""
    method, setting, chooser = one
    reader = Reader(model, chooser)
    score = task.score(reader, seed)
    weights, head = _weights(model)
    choosing = sum(result.choosing_flops for result in reader.results)
    densities = [float(result.density or 0) * result.dense_flops for result in reader.results]
    dense = sum(result.dense_flops for result in reader.results)
    linear = 2 * (weights * reader.tokens + head * reader.prompts)
    total = sum(result.flops for result in reader.results)
    return Point(
        name, method, setting, task.name, task.length, seed, weights + head, score,
        sum(densities) / dense, linear / reader.prompts, (total - choosing) / reader.prompts,
        choosing / reader.prompts, _decode_bytes(model, weights + head, reader),
        reader.seconds / reader.prompts,
    )  # fmt: skip


def _weights(model: Any) -> tuple[int, int]:
    """Weights of linear layers in the blocks, and of the output layer, which one place needs."""
    head = model.get_output_embeddings()
    every = {id(m): m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)}
    own = every.pop(id(head), 0)
    return sum(every.values()), own or (0 if head is None else head.weight.numel())


def _decode_bytes(model: Any, weights: int, reader: Reader) -> float:
    """What one new token reads after a prompt: weights once, and all keys and values."""
    width = next(model.parameters()).element_size()
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * size * reader.tokens / reader.prompts
    return float(width * (weights + cached))


def _as_json(points: Sequence[Point]) -> str:
    return json.dumps([asdict(point) for point in points], indent=1) + "\n"


def _write(path: Path, points: Sequence[Point]) -> None:
    write_whole(path, lambda place: place.write_text(_as_json(points)))


def _key(point: Point) -> tuple[object, ...]:
    return point.model, point.setting, point.task, point.length, point.seed


def _kept(path: Path | None) -> list[Point]:
    """Points of an earlier run; raises UsageError where the file holds something else."""
    if path is None or not path.exists():
        return []
    try:
        return [Point(**one) for one in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} holds no points of a comparison: {error}") from error
