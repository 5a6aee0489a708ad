"""What a model's own answers lose where its attention changes: gradients of attention's outputs."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.attention import AttentionCall
from gossamer.core.errors import UsageError
from gossamer.engine.data import Batch, device_of, real_tokens
from gossamer.engine.hooks import evaluating
from gossamer.engine.inputs.attention import sparse_attention
from gossamer.engine.inputs.counting import full_layout
from gossamer.engine.inputs.protocols import LearnsFromAnswers
from gossamer.ops.attention import Layout


class _Dense:
    """The dense layout as a method."""

    def __init__(self, method: LearnsFromAnswers) -> None:
        self.card = method.card

    def layout(self, call: AttentionCall) -> Layout:
        """All pairs."""
        return full_layout(call)


def observe_answers(
    model: nn.Module, method: LearnsFromAnswers, data: Sequence[Batch]
) -> dict[int, list[Any]]:
    """What the method observes in each layer, from prompts and the model's greedy answers.

    No map of attention is held: the method is given a layer's call and the gradient of its output.
    """
    prompts = [_prompt(model, index, batch) for index, batch in enumerate(data)]
    seen: dict[int, list[Any]] = defaultdict(list)
    calls: list[tuple[AttentionCall, Tensor]] = []
    with evaluating(model), _graph_from_embeddings(model):
        texts = [_answered(model, prompt, method.answer) for prompt in prompts]
        with sparse_attention(
            model, _Dense(method), dense_below=0, watch=lambda *both: calls.append(both)
        ):
            for ids in texts:
                calls.clear()
                with torch.enable_grad():
                    loss = _loss(model, ids, method.answer)
                outputs = [output for _, output in calls]
                gradients = torch.autograd.grad(loss, outputs)
                for (call, _), gradient in zip(calls, gradients, strict=True):
                    seen[call.layer].append(method.observe_gradient(call, gradient))
    return dict(seen)


def _prompt(model: nn.Module, index: int, batch: Batch) -> Tensor:
    """Token ids (batch, tokens) of a model that can answer, without padding."""
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    if not callable(getattr(model, "generate", None)):
        raise UsageError(f"{type(model).__name__} writes no answers (generate), which are needed")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        raise UsageError(f"calibration batch {index} holds no input_ids (batch, tokens)")
    if real_tokens(batch) is not None:
        raise UsageError(
            f"calibration batch {index} has padding; give prompts of one length together"
        )
    return ids.to(device_of(model))


def _answered(model: Any, prompt: Tensor, answer: int) -> Tensor:
    """The prompt and so many tokens that the model takes to be most likely."""
    found: Tensor = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=1,
        max_new_tokens=answer, min_new_tokens=answer,
    )  # fmt: skip
    return found


def _loss(model: nn.Module, ids: Tensor, answer: int) -> Tensor:
    """Cross-entropy of the last `answer` tokens."""
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    given = {"logits_to_keep": answer + 1} if few else {}
    logits = model(input_ids=ids, use_cache=False, **given).logits[:, -answer - 1 : -1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, -answer:].flatten()
    )


@contextmanager
def _graph_from_embeddings(model: Any) -> Iterator[None]:
    """While open, the input embeddings alone require gradients, whatever was frozen."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
