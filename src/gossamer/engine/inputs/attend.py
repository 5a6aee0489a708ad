"""Attention by a method that chooses pairs: one call, with or without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.engine.inputs.protocols import PairChooser, StepAttention
from gossamer.ops.attention import Layout, attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: PairChooser,
    *,
    causal: bool,
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """See `gossamer.attend`, which also takes a method by its name."""
    check_chooser(method)
    check_shapes(query, key, value, padding)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = AttentionCall(query, key, value, scale, causal)
    if padding is None:
        return computed(call, method)
    return each_text(call, padding, lambda part: computed(part, method))


def computed(call: AttentionCall, method: PairChooser) -> Tensor:
    """The output over the pairs that the method chooses."""
    output, lse = run_layout(call, choose(call, method))
    check_answered(method, call, lse)
    return output


def choose(call: AttentionCall, method: PairChooser) -> Layout:
    """The method's choice, without gradients."""
    with torch.no_grad():
        return method.layout(call)


def check_answered(method: PairChooser, call: AttentionCall, lse: Tensor) -> None:
    """Raise UsageError where a query had no key, and its output is 0."""
    if bool((lse == -torch.inf).any()):
        raise UsageError(
            f"{method.card.name} left a query of layer {call.layer} without keys; every query "
            "needs one, or its output would be 0"
        )


def run_layout(call: AttentionCall, layout: Layout) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp over a layout's pairs."""
    return attention(call.query, call.key, call.value, layout, causal=call.causal, scale=call.scale)


def each_text(
    call: AttentionCall, padding: Tensor, run: Callable[[AttentionCall], Tensor]
) -> Tensor:
    """`run` on each text of a batch without its padding; zeros at the padding.

    padding: bool (batch, keys), True for real tokens. One call where all tokens are real.
    """
    if bool(padding.all()):
        return run(call)
    shape = (*call.query.shape[:3], call.value.shape[3])
    parts = []
    for text, real in enumerate(padding):
        own = real[call.past :]
        whole = call.query.new_zeros(1, *shape[1:])
        if bool(own.any()):
            keys = _places(real)
            tensors = [x[text : text + 1][:, :, keys] for x in (call.key, call.value)]
            queries = _places(own)
            query = call.query[text : text + 1][:, :, queries]
            found = run(replace(call, query=query, key=tensors[0], value=tensors[1]))
            whole[:, :, queries] = found
        parts.append(whole)
    return torch.cat(parts)


def check_chooser(method: Any) -> None:
    """Raise UsageError unless `method` is an instance that chooses pairs."""
    if isinstance(method, type):
        raise UsageError(f"method is the class {method.__name__}; pass an instance of it")
    carded = isinstance(getattr(method, "card", None), Card)
    if carded and isinstance(method, StepAttention) and not isinstance(method, PairChooser):
        raise UsageError(
            f"{method.card.name} is for diffusion models, whose steps it follows: open "
            "gs.sparse_denoising"
        )
    if not carded or not isinstance(method, PairChooser):
        raise UsageError(
            f"{type(method).__name__} chooses no pairs of a prompt: such a method has a card and "
            "layout(call); see gossamer methods attention"
        )


def check_shapes(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
    """Raise UsageError unless the queries are the last of the keys, and heads divide."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise UsageError(f"{name} is (batch, heads, length, width), not {tuple(x.shape)}")
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        raise UsageError(f"{query.shape[1]} heads are no multiple of {key.shape[1]} kv heads")
    if query.shape[2] > key.shape[2] or not query.shape[2]:
        raise UsageError(
            f"{query.shape[2]} queries for {key.shape[2]} keys: the queries are the last of the "
            "keys, and there is at least one"
        )
    wanted = (key.shape[0], key.shape[2])
    if padding is not None and (padding.dtype != torch.bool or tuple(padding.shape) != wanted):
        raise UsageError(
            f"padding is bool {wanted}, True for real tokens, not {padding.dtype} "
            f"{tuple(padding.shape)}"
        )


def _places(real: Tensor) -> slice | Tensor:
    """The True positions: a slice where they are one piece, so that nothing is copied."""
    places = real.nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if places.numel() == last + 1 - first else places
