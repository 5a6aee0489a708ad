"""How a cache is handed the calls of one model's attention.

A layer of transformers gives its keys to the cache, and then looks up the attention that its config
names. Between the two the name is the cache's own; the first thing the cache's attention does is to
put the former one back. So the model is changed for the length of one call only, and a model that
is run without the cache meets nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.engine.inputs.servable import IMPLEMENTATION, attention_layers

_VOLATILE = ("dtype", "torch_dtype", "transformers_version")


class Binding:
    """The attention layers of one model. Copies of a cache share it."""

    def __init__(self, model: nn.Module) -> None:
        layers = attention_layers(model)
        for index, (name, layer) in enumerate(layers.items()):
            if getattr(layer, "layer_idx", None) != index:
                raise UsageError(
                    f"{name} is no layer {index} of a decoder (layer_idx "
                    f"{getattr(layer, 'layer_idx', None)}); caches are for causal language models"
                )
            if not layer.is_causal:
                raise UsageError(f"{name} attends to both sides; caches are for causal models")
        self.names = list(layers)
        self.kind = type(model).__name__
        self.digest = digest_of(next(iter(layers.values())).config)
        self.configs = [layer.config for layer in layers.values()]
        self._layers = [weakref.ref(layer) for layer in layers.values()]
        self._open: tuple[int, str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self

    def holds(self, layer: nn.Module, index: int) -> bool:
        """Whether this is the model's layer of that number."""
        return self._layers[index]() is layer

    def open(self, index: int, function: Callable[..., Any]) -> None:
        """Let the next lookup of the layer's attention find `function`."""
        from transformers import AttentionInterface

        config, name = self.configs[index], f"gossamer_cache_{id(self):x}"
        AttentionInterface.register(name, function)
        self._open = (index, vars(config)[IMPLEMENTATION])
        setattr(config, IMPLEMENTATION, name)

    def close(self) -> tuple[int, str] | None:
        """Put the former name back: the layer's number and that name; None where none was open."""
        from transformers import AttentionInterface

        found, self._open = self._open, None
        if found is not None:
            setattr(self.configs[found[0]], IMPLEMENTATION, found[1])
            AttentionInterface._global_mapping.pop(f"gossamer_cache_{id(self):x}", None)
        return found


def digest_of(config: Any) -> str:
    """Of all in a config that makes one model's keys differ from another's."""
    facts = {
        key: value
        for key, value in config.to_dict().items()
        if not key.startswith("_") and key not in _VOLATILE
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
