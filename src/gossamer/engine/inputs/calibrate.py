"""Methods of attention that learn from prompts before they choose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from gossamer.core.attention import AttentionCall
from gossamer.core.errors import UsageError
from gossamer.core.result import unwrap
from gossamer.engine.data import Batch, read_batches
from gossamer.engine.hooks import evaluating
from gossamer.engine.inputs.attention import sparse_attention
from gossamer.engine.inputs.counting import full_layout
from gossamer.engine.inputs.own_answers import observe_answers
from gossamer.engine.inputs.protocols import LearnsFromAnswers, LearnsFromPrompts
from gossamer.ops.attention import Layout


class _Watcher:
    """The dense layout as a method, which hands every call to another one."""

    def __init__(self, method: LearnsFromPrompts) -> None:
        self._method, self.card = method, method.card
        self.seen: dict[int, list[Any]] = defaultdict(list)

    def layout(self, call: AttentionCall) -> Layout:
        """All pairs."""
        self.seen[call.layer].append(self._method.observe(call))
        return full_layout(call)


def calibrate_attention(
    model: nn.Module, method: LearnsFromPrompts | LearnsFromAnswers, data: Iterable[Batch]
) -> Any:
    """See `gossamer.calibrate_attention`, which also takes a method by its name."""
    model = unwrap(model)
    if isinstance(method, type):
        raise UsageError(f"method is the class {method.__name__}; pass an instance of it")
    if isinstance(method, LearnsFromAnswers):
        return method.fitted(observe_answers(model, method, read_batches(data)))
    if not isinstance(method, LearnsFromPrompts):
        raise UsageError(f"{type(method).__name__} learns nothing from data: use it as it is")
    watcher = _Watcher(method)
    with evaluating(model), sparse_attention(model, watcher, dense_below=0):
        for batch in read_batches(data):
            model(**batch) if isinstance(batch, dict) else model(batch)
    if not watcher.seen:
        raise UsageError("data holds no prompt of two tokens or more to learn from")
    return method.fitted(watcher.seen)
