"""Long prompts for the claims about attention: recall and scores at equal density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.attention_comparison import Everything
from gossamer.claims.language import subject
from gossamer.core.attention import AttentionCall
from gossamer.core.text import token_ids, windows
from gossamer.engine.inputs.attend import run_layout
from gossamer.engine.inputs.counting import full_layout, pairs, possible_pairs
from gossamer.engine.measure.frontier import DENSE, at_density, means
from gossamer.methods import build
from gossamer.testbed import heldout_text, language_model, symbol_model
from gossamer.testbed.packaged import folder
from gossamer.testbed.symbols import SymbolTask

LENGTH = 512
LAYERS = (2, 11, 20, 29)
"""Of SmolLM2's 30, for recall."""
WHERE = (
    "SmolLM2-135M in bfloat16, windows of 512 tokens of held-out documentation, one for each seed; "
    "recall is the mean over layers 2, 11, 20 and 29 on the dense run's queries and keys."
)
SYMBOLS = (
    "The bundled model of symbols (0.9 million parameters, prompts of 512 symbols, 16 questions of "
    "each kind for each seed)."
)
CURVES: dict[str, tuple[str, ...]] = {
    "streamingllm": tuple(f"streamingllm:window={w},block=16" for w in (16, 40, 80, 150, 260, 420)),
    "blocksparse": tuple(
        f"blocksparse:block=16,density={d}" for d in (0.06, 0.12, 0.25, 0.5, 0.75)
    ),
    "verticalslash": tuple(
        f"verticalslash:verticals={n},slashes={n},near=16,last=64,block=16"
        for n in (18, 30, 60, 120, 260)
    ),
    "flexprefill": tuple(
        f"flexprefill:share={s},least=16,near=16,last=64,block=16"
        for s in (0.2, 0.5, 0.7, 0.85, 0.95)
    ),
    "anchorattention": tuple(
        f"anchorattention:theta={t},step=4,block=16" for t in (-4, 0, 2, 4, 6, 9)
    ),
}  # fmt: skip
"""Settings of each method, from few to most of the pairs."""


class _Keeper:
    """The dense layout as a method, which keeps the calls of some layers."""

    card = Everything.card

    def __init__(self, layers: Sequence[int] | None) -> None:
        self.layers, self.calls = layers, list[AttentionCall]()

    def layout(self, call: AttentionCall) -> Any:
        """All pairs."""
        if self.layers is None or call.layer in self.layers:
            self.calls.append(call)
        return full_layout(call)


@cache
def language(short: bool) -> Any:
    """SmolLM2; the bundled byte-level model for the short form."""
    return language_model() if short else subject(torch.bfloat16).model


def window(seed: int, short: bool, length: int = LENGTH) -> Tensor:
    """Held-out tokens (1, length + 1) of a seed, which differ from seed to seed."""
    if short:
        ids = torch.frombuffer(bytearray(heldout_text()), dtype=torch.uint8)
        return windows(ids, 1, 384, seed, ahead=1)
    return windows(_held_out(), 1, length, seed, ahead=1)


@cache
def _held_out() -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("smollm2"), local_files_only=True)
    return token_ids(tokenizer, heldout_text())


@torch.no_grad()
def calls(
    model: nn.Module, ids: Tensor, layers: Sequence[int] | None = None
) -> list[AttentionCall]:
    """What some layers, or all, are called with in a dense run."""
    keeper = _Keeper(layers)
    with gs.sparse_attention(model, keeper, dense_below=0):
        model(ids, use_cache=False, logits_to_keep=1)
    return keeper.calls


@cache
def language_calls(seed: int, short: bool) -> list[AttentionCall]:
    """Of the language model on a seed's window."""
    return calls(language(short), window(seed, short)[:, :-1], (0, 2) if short else LAYERS)


@torch.no_grad()
def figures(called: Sequence[AttentionCall], method: Any) -> tuple[float, float]:
    """Density and recall of a method, or of its name, over calls."""
    chooser = build(method) if isinstance(method, str) else method
    density, recall = [], []
    for call, dense in zip(called, _dense(tuple(called)), strict=True):
        layout = chooser.layout(call)
        held = (run_layout(call, layout)[1] - dense).exp().clamp(max=1)
        recall.append(float(held.mean()))
        density.append(pairs(layout, call) / possible_pairs(call))
    return sum(density) / len(density), sum(recall) / len(recall)


@cache
def _dense(called: tuple[AttentionCall, ...]) -> list[Tensor]:
    """The log-sum-exp over all pairs."""
    return [run_layout(call, full_layout(call))[1] for call in called]


@cache
def curve(seed: int, short: bool, name: str) -> list[tuple[float, float]]:
    """Density and recall at each of a method's settings, on a seed's calls."""
    called = language_calls(seed, short)
    return [figures(called, setting) for setting in CURVES[name]]


def at(found: Sequence[tuple[float, float]], density: float) -> float:
    """The recall at a density, between neighbours on a logarithmic scale; 1 at density 1.

    Below the first setting it is that setting's, so a method is never counted as worse than it is
    for want of a setting.
    """
    known = sorted([*found, (1.0, 1.0)])
    if density <= known[0][0]:
        return known[0][1]
    for (low, before), (high, after) in pairwise(known):
        if low <= density <= high:
            share = math.log(density / low) / math.log(high / low) if high > low else 1.0
            return before + share * (after - before)
    raise gs.UsageError(f"a density is at most 1, not {density}")


def symbol_scores(
    names: Sequence[str], seed: int, short: bool, tasks: Sequence[str], densities: Sequence[float]
) -> dict[str, float]:
    """Exact match of methods on the model of symbols at densities, and of dense attention."""
    size, prompts = (192, 2) if short else (512, 4)
    model = symbol_model()
    wanted: Mapping[str, Sequence[str]] = {name: CURVES[name] for name in names}
    found = gs.compare_attention(
        model, wanted, [SymbolTask(task, size, prompts) for task in tasks], seeds=[seed]
    )
    scores: dict[str, float] = {}
    for task in tasks:
        points = means(p for p in found.points if p.task == task)
        dense = [p for p in points if p.method == DENSE]
        scores[f"{task}, dense"] = dense[0].score
        for name in names:
            own = [p for p in points if p.method == name]
            for density in densities:
                score = at_density([*dense, *own], max(density, min(p.density for p in own)))
                assert score is not None
                scores[f"{task}, {name} at {density:g}"] = score
    return scores
