"""Sparse attention inside models of transformers, for as long as a block is open."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.attention import AttentionCall
from gossamer.core.errors import MissingExtra, UsageError
from gossamer.core.result import unwrap
from gossamer.engine.inputs.attend import (
    check_answered,
    check_chooser,
    choose,
    each_text,
    run_layout,
)
from gossamer.engine.inputs.counting import full_layout
from gossamer.engine.inputs.masks import Seen, decode, encode
from gossamer.engine.inputs.protocols import PairChooser
from gossamer.engine.inputs.rotation import rotation_of
from gossamer.engine.inputs.servable import IMPLEMENTATION, attention_layers, check_arguments
from gossamer.engine.inputs.tally import AttentionResult, Tally

Watch = Callable[[AttentionCall, Tensor], None]
DENSE_BELOW = 2048
"""Keys below which choosing costs more than it saves; see `gossamer.sparse_attention`."""


class AttentionRun:
    """What a block of `sparse_attention` yields; `result` tells what has happened so far."""

    def __init__(
        self,
        method: PairChooser,
        layers: dict[str, nn.Module],
        rotations: list[Tensor | None],
        dense_below: int,
        measure: bool,
        watch: Watch | None = None,
    ) -> None:
        self._method, self._dense_below, self._measure = method, dense_below, measure
        self._watch = watch
        self._layers = layers
        self._index = {id(layer): index for index, layer in enumerate(layers.values())}
        self._tally = Tally()
        self.rotations = rotations

    @property
    def result(self) -> AttentionResult:
        """The figures of all calls so far."""
        return self._tally.result(self._method, list(self._layers), self._dense_below)

    @property
    def layers(self) -> int:
        """How many attention layers the model has."""
        return len(self._layers)

    def dense(self, queries: int, keys: int) -> bool:
        """Whether such calls run as the model runs them: decoding, and short prompts."""
        return queries == 1 or keys < self._dense_below

    def index(self, layer: nn.Module) -> int:
        """The layer's number; raises UsageError for one of another model."""
        if id(layer) not in self._index:
            raise UsageError(
                f"a {type(layer).__name__} was called that the model of gs.sparse_attention does "
                "not hold; another model shares its config: give that one a copy"
            )
        return self._index[id(layer)]

    def outside(self, index: int, queries: int) -> None:
        """Take note of a call that runs dense."""
        self._tally.dense(index, queries)

    def attend(self, call: AttentionCall, seen: Seen | None) -> Tensor:
        """The output of one call, whose keys may be padded."""
        if seen is None:
            return self._one(call)
        key, value = (x[:, :, : seen.keys] for x in (call.key, call.value))
        return each_text(
            replace(call, key=key, value=value, causal=seen.causal), seen.real, self._one
        )

    def _one(self, call: AttentionCall) -> Tensor:
        if call.keys < self._dense_below:  # a short text in a batch with longer ones
            self._tally.dense(call.layer, call.queries)
            return run_layout(call, full_layout(call))[0]
        layout, choosing = self._tally.chosen(call, lambda: choose(call, self._method))
        output, lse = run_layout(call, layout)
        check_answered(self._method, call, lse)
        if self._watch is not None:
            self._watch(call, output)
        with torch.no_grad():
            dense = run_layout(call, full_layout(call)) if self._measure else None
            self._tally.sparse(call, layout, choosing, (output, lse), dense)
        return output


@contextmanager
def sparse_attention(
    model: nn.Module,
    method: PairChooser,
    *,
    dense_below: int = DENSE_BELOW,
    measure: bool = False,
    watch: Watch | None = None,
) -> Iterator[AttentionRun]:
    """See `gossamer.sparse_attention`, which also takes a method by its name.

    watch: given every sparse call with its output, gradients attached.
    """
    model = unwrap(model)
    check_chooser(method)
    if isinstance(dense_below, bool) or not isinstance(dense_below, int) or dense_below < 0:
        raise UsageError(f"dense_below is a whole number from 0, not {dense_below!r}")
    registries = _registries()
    layers = attention_layers(model)
    rotations = [rotation_of(model, layer) for layer in layers.values()]
    run = AttentionRun(method, layers, rotations, dense_below, measure, watch)
    configs = _configs(model)
    name = f"gossamer_{id(run):x}"
    before = {key: vars(config)[IMPLEMENTATION] for key, config in configs.items()}
    if len(set(before.values())) > 1:
        raise UsageError(
            "parts of the model run eager attention and parts sdpa; call "
            "model.set_attn_implementation('sdpa') first"
        )
    functions = _functions(run, next(iter(before.values())))
    try:
        for registry, function in zip(registries, functions, strict=True):
            registry.register(name, function)
        for config in configs.values():
            setattr(config, IMPLEMENTATION, name)
        yield run
    finally:
        for key, config in configs.items():
            setattr(config, IMPLEMENTATION, before[key])
        for registry in registries:
            registry._global_mapping.pop(name, None)
    run.result.check_reached()


def _registries() -> tuple[Any, Any]:
    """Where transformers keeps attention and mask functions."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise UsageError("gs.sparse_attention needs a newer transformers, such as 5.23")
    return AttentionInterface, AttentionMaskInterface


def _configs(model: nn.Module) -> dict[int, Any]:
    """Every config of the model and its parts that names an attention, by id."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return {id(config): config for config in found if IMPLEMENTATION in vars(config or nn)}


def _functions(run: AttentionRun, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The attention and the mask function in place of those of `name`."""
    from transformers import AttentionMaskInterface

    own_mask = AttentionMaskInterface()[name]

    def mask(**given: Any) -> Any:
        if run.dense(given["q_length"], given["kv_length"]):
            return own_mask(**given)
        return encode(given)

    def attend(
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Any]:
        index, queries = run.index(layer), query.shape[2]
        if run.dense(queries, key.shape[2]):
            run.outside(index, queries)
            if is_causal is not None:
                others["is_causal"] = is_causal
            return own_attention(layer, name)(
                layer, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                **others,
            )  # fmt: skip
        check_arguments(index, dropout, others)
        seen = None if attention_mask is None else decode(attention_mask, queries, index)
        # Without a mask, sdpa goes by this flag, and eager attends to both sides.
        causal = name == "sdpa" and bool(layer.is_causal if is_causal is None else is_causal)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        call = AttentionCall(
            query.to(value.dtype), key.to(value.dtype), value, scale, causal, index,
            run.layers, run.rotations[index],
        )  # fmt: skip
        return run.attend(call, seen).transpose(1, 2).contiguous(), None

    return attend, mask


def own_attention(layer: nn.Module, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that the layer runs under `name`."""
    from transformers import AttentionInterface

    if name != "eager":
        found: Callable[..., tuple[Tensor, Any]] = AttentionInterface()[name]
        return found
    module = sys.modules[type(layer).__module__]
    own = getattr(module, "eager_attention_forward", None)
    if own is None:
        raise UsageError(f"{type(layer).__name__} has no eager attention: set sdpa")
    return own
