"""Where transformers keep the neurons and heads that can be cut out of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError

_FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("c_fc",), "c_proj", 1),
    (("fc1",), "fc2", 1),
)
"""Layers that write the neurons, the one that reads them, how often each writes side by side."""
_ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"))
_NEURONS = ("intermediate_size", "ffn_dim", "n_inner")
"""What configs call the number of neurons."""


@dataclass(frozen=True, eq=False)
class Slot:
    """What one layer holds of the units. writes: along its outputs, else its inputs. index: the
    places along that side, int64 (units, places per unit)."""

    layer: str
    writes: bool
    index: Tensor


@dataclass(frozen=True, eq=False)
class CoupledWidth:
    """Units of one module that several of its layers share. kind: `neurons` or `heads`."""

    name: str
    kind: str
    units: int
    slots: tuple[Slot, ...]


def find_widths(model: nn.Module, kind: str) -> list[CoupledWidth]:
    """The coupled widths of one kind, in module order; heads come by key-value head.

    Raises UsageError for an unknown kind, and where the config does not say how many heads share
    a key-value head.
    """
    if kind not in ("neurons", "heads"):
        raise UsageError(f"{kind!r} is no kind of coupled width; choose neurons, heads or both")
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        slots = _neurons(name, children) if kind == "neurons" else _heads(model, name, children)
        if slots:
            found.append(CoupledWidth(name, kind, len(slots[0].index), slots))
    return found


def config_fields(config: Any, kind: str, count: int) -> dict[str, int]:
    """What a config of transformers says when each layer keeps `count` units of a kind."""
    if kind == "neurons":
        name = next((x for x in _NEURONS if hasattr(config, x)), _NEURONS[0])
        return {name: count}
    heads, groups = heads_of(config)
    return {
        "num_attention_heads": count * (heads // groups),
        "num_key_value_heads": count,
        "head_dim": head_dim(config),
    }


def heads_of(config: Any) -> tuple[int, int]:
    """How many query heads and key-value heads a layer has."""
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def head_dim(config: Any) -> int:
    """How wide one head is."""
    told = getattr(config, "head_dim", None)
    return int(told or config.hidden_size // config.num_attention_heads)


def _neurons(name: str, children: Mapping[str, nn.Module]) -> tuple[Slot, ...]:
    for writers, reader, parts in _FEED_FORWARD:
        if reader not in children or not all(x in children for x in writers):
            continue
        count = _sides(children[reader])[1]
        places = torch.arange(count).unsqueeze(1)
        beside = places + count * torch.arange(parts)
        if any(_sides(children[x])[0] != count * parts for x in writers):
            continue
        slots = [Slot(f"{name}.{x}" if name else x, True, beside) for x in writers]
        return (*slots, Slot(f"{name}.{reader}" if name else reader, False, places))
    return ()


def _heads(model: nn.Module, name: str, children: Mapping[str, nn.Module]) -> tuple[Slot, ...]:
    for query, key, value, out in _ATTENTION:
        if not all(x in children for x in (query, key, value, out)):
            continue
        config: Any = getattr(model, "config", None)
        if config is None or not hasattr(config, "num_attention_heads"):
            raise UsageError(f"{name}: no config says how many heads it has")
        heads, groups = heads_of(config)
        width = head_dim(config)
        narrow = torch.arange(groups * width).reshape(groups, -1)
        wide = torch.arange(heads * width).reshape(groups, -1)
        expected = {query: (True, wide), key: (True, narrow), value: (True, narrow),
                    out: (False, wide)}  # fmt: skip
        for child, (writes, index) in expected.items():
            found = _sides(children[child])[0 if writes else 1]
            if found != index.numel():
                raise UsageError(
                    f"{name}.{child}: is {found} wide, where the config says {index.numel()}"
                )
        return tuple(Slot(f"{name}.{x}", *slot) for x, slot in expected.items())
    return ()


def _sides(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; (0, 0) of others."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[1], weight.shape[0]
    return 0, 0
