"""Prompts put together from segments whose keys and values are kept: encoded once, used anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.engine.data import device_of
from gossamer.engine.hooks import evaluating
from gossamer.engine.inputs.rotation import rotation_of
from gossamer.engine.inputs.servable import attention_layers
from gossamer.nn.attention_gate import rotated

Pair = tuple[Tensor, Tensor]


class SegmentGraph(Protocol):
    """What a method says of segments, such as `gossamer.attention.GraphKV`."""

    @property
    def prefix(self) -> int: ...

    @property
    def sources(self) -> Sequence[int]: ...

    @property
    def targets(self) -> Sequence[int]: ...

    @property
    def question(self) -> int: ...

    def positions(self, length: int) -> Tensor: ...

    def sources_of(self, target: int) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens with their keys and values, from which positions were taken out.

    Attributes
    ----------
    ids : Tensor
        int64 (length,).
    layers : tuple of (Tensor, Tensor)
        Keys in float32, at no position, and values; (kv_heads, length, width) each.
    """

    ids: Tensor
    layers: tuple[Pair, ...]


def encode_segment(model: nn.Module | PruneResult | CompressResult, ids: Tensor) -> Segment:
    """Run a model on a segment alone, and keep its keys and values without positions.

    Parameters
    ----------
    model : nn.Module
        Of transformers, with rotary positions in halves, such as Llama.
    ids : Tensor
        int64 (length,).

    Returns
    -------
    Segment
        To be put into any number of prompts with `join_segments`.

    Raises
    ------
    UsageError
        For a model without such positions, or ids of another shape.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...     num_attention_heads=2,
    ... )).eval()
    >>> segment = gs.encode_segment(model, torch.arange(10))
    >>> segment.layers[0][0].shape
    torch.Size([2, 10, 16])
    """
    model = unwrap(model)
    rotations = _rotations(model)
    _check_ids("a segment", ids)
    cache = _cache()
    with evaluating(model):
        model(input_ids=ids.to(device_of(model)).unsqueeze(0), past_key_values=cache)
    places = torch.arange(len(ids), device=device_of(model))
    return Segment(
        ids,
        tuple(
            (rotated(key[0].float(), places, -rotation.float()), value[0])
            for (key, value), rotation in zip(_pairs(cache), rotations, strict=True)
        ),
    )


def join_segments(
    model: nn.Module | PruneResult | CompressResult,
    graph: SegmentGraph,
    prefix: Tensor,
    sources: Sequence[Segment],
    targets: Sequence[Tensor],
) -> tuple[Any, int]:
    """Put a prompt together along a graph of segments, before its question.

    Sources are moved to their positions. The prefix and each target run through the model, a target
    behind the prefix and its own sources. The cache holds the prefix, all sources and all targets.

    Parameters
    ----------
    model : nn.Module
        The model that encoded the sources.
    graph : GraphKV
        Lengths and edges, as `gs.attention.GraphKV`.
    prefix : Tensor
        int64 (length,).
    sources : sequence of Segment
        From `encode_segment`, of the graph's lengths.
    targets : sequence of Tensor
        int64 (length,) each.

    Returns
    -------
    tuple of DynamicCache and int
        The cache, and the position of the question's first token. The question is run with
        `position_ids` that count on from there.

    Raises
    ------
    UsageError
        Where lengths are not the graph's, or another model encoded the sources.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...     num_attention_heads=2,
    ... )).eval()
    >>> graph = gs.attention.GraphKV(prefix=3, sources=(5, 4), targets=(6,))
    >>> sources = [gs.encode_segment(model, torch.arange(n)) for n in graph.sources]
    >>> cache, place = gs.join_segments(
    ...     model, graph, torch.arange(3), sources, [torch.arange(6)]
    ... )
    >>> cache.get_seq_length(), place
    (18, 14)
    """
    model = unwrap(model)
    rotations = _rotations(model)
    _check_lengths(graph, prefix, sources, targets)
    for segment in sources:
        _check_made_for(segment, model, len(rotations))
    places = graph.positions(len(prefix) + sum(graph.sources) + sum(graph.targets))
    with evaluating(model):
        begun = [_ran(model, [], prefix, places[: len(prefix)])] if len(prefix) else []
        done, moved = len(prefix), []
        for segment in sources:
            moved.append(_placed(segment, places[done : done + len(segment.ids)], rotations, model))
            done += len(segment.ids)
        parts = [*begun, *moved]
        for number, ids in enumerate(targets):
            seen = [*begun, *(moved[i] for i in graph.sources_of(number))]
            found = _ran(model, seen, ids, places[done : done + len(ids)])
            parts.append([(k[:, :, -len(ids) :], v[:, :, -len(ids) :]) for k, v in found])
            done += len(ids)
    return _filled(parts), graph.question


def _ran(model: nn.Module, seen: list[list[Pair]], ids: Tensor, places: Tensor) -> list[Pair]:
    """Keys and values by layer after some tokens have run behind others."""
    device, cache = device_of(model), _filled(seen)
    total = cache.get_seq_length() + len(ids)
    model(
        input_ids=ids.to(device).unsqueeze(0), position_ids=places.to(device).unsqueeze(0),
        attention_mask=torch.ones(1, total, dtype=torch.long, device=device),
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    return _pairs(cache)


def _placed(
    segment: Segment, places: Tensor, rotations: list[Tensor], model: nn.Module
) -> list[Pair]:
    """A segment's keys and values at positions, (1, kv_heads, length, width)."""
    device = device_of(model)
    return [
        (rotated(key.to(device), places.to(device), rotation.float()).to(value.dtype)[None],
         value.to(device)[None])
        for (key, value), rotation in zip(segment.layers, rotations, strict=True)
    ]  # fmt: skip


def _filled(parts: list[list[Pair]]) -> Any:
    """A cache that holds these, one behind another."""
    cache = _cache()
    for layer in range(len(parts[0]) if parts else 0):
        key, value = (torch.cat([part[layer][i] for part in parts], dim=2) for i in (0, 1))
        cache.update(key, value, layer)
    return cache


def _cache() -> Any:
    try:
        from transformers import DynamicCache
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    return DynamicCache()


def _pairs(cache: Any) -> list[Pair]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _rotations(model: nn.Module) -> list[Tensor]:
    """Of each attention layer; raises UsageError where one rotates otherwise or not at all."""
    found = []
    with evaluating(model):  # dropout does not matter here
        layers = attention_layers(model)
    for name, layer in layers.items():
        rotation = rotation_of(model, layer)
        if rotation is None:
            raise UsageError(
                f"{name} has no rotary positions in halves with fixed frequencies, without which "
                "keys cannot be moved"
            )
        found.append(rotation)
    return found


def _check_ids(what: str, ids: Tensor, least: int = 1) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype != torch.long or len(ids) < least:
        raise UsageError(f"{what} is int64 (length,), of {least} or more token ids")


def _check_lengths(
    graph: SegmentGraph, prefix: Tensor, sources: Sequence[Segment], targets: Sequence[Tensor]
) -> None:
    """Raise UsageError unless everything has the length that the graph says."""
    _check_ids("the prefix", prefix, 0)
    for ids in targets:
        _check_ids("a target", ids)
    for what, given, wanted in (
        ("the prefix", [len(prefix)], [graph.prefix]),
        ("sources", [len(segment.ids) for segment in sources], list(graph.sources)),
        ("targets", [len(ids) for ids in targets], list(graph.targets)),
    ):
        if given != wanted:
            raise UsageError(f"{what} of {given} tokens, but the graph says {wanted}")


def _check_made_for(segment: Segment, model: nn.Module, layers: int) -> None:
    """Raise UsageError where a segment has other layers or heads than the model."""
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    have = {(key.shape[0], key.shape[2]) for key, _ in segment.layers}
    if len(segment.layers) != layers or have != {(heads, width)}:
        raise UsageError(
            f"a source of {len(segment.layers)} layers with (heads of keys, width) "
            f"{sorted(have)}, but the model has {layers} with {(heads, width)}: it was "
            "encoded by another model"
        )
