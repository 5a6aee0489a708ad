"""The cache that a model of transformers is given as `past_key_values`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from gossamer.core.errors import UsageError
from gossamer.engine.inputs.attention import own_attention
from gossamer.engine.inputs.caches import files
from gossamer.engine.inputs.caches.binding import Binding
from gossamer.engine.inputs.caches.calls import real_tokens
from gossamer.engine.inputs.caches.compressed import CompressingKeeper, KeyCompressor
from gossamer.engine.inputs.caches.evicted import EvictingKeeper
from gossamer.engine.inputs.caches.layer import Arrival, SparseLayer
from gossamer.engine.inputs.caches.rows import Keeper
from gossamer.engine.inputs.caches.selected import SelectingKeeper
from gossamer.engine.inputs.caches.tally import CacheResult, tallied
from gossamer.engine.inputs.protocols import KeyEvictor, KeySelector
from gossamer.engine.inputs.servable import check_arguments


class SparseCache(Cache):
    """A cache whose keys a method evicts, or of which it chooses what each token reads.

    Made by `gossamer.attention_cache` for one model. Prompts run as the model runs them; the prompt
    is over when the first single token comes.
    """

    def __init__(
        self, model: nn.Module, method: Any, saved: str | os.PathLike[str] | None = None
    ) -> None:
        self.method, self.binding = method, Binding(model)
        check_model(method, model, len(self.binding.names))
        count = len(self.binding.names)
        super().__init__(layers=[SparseLayer(keeper_of(method, i, count)) for i in range(count)])
        if saved is not None:
            files.restore(saved, self.layers, self.binding.digest, method)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take note of a layer's new keys and values, which its attention will hand over."""
        self._check_order(layer_idx, key_states.shape[2])
        key = key_states.to(value_states.dtype)
        given = self.layers[layer_idx].update(key, value_states)
        self.binding.open(layer_idx, partial(self._attend, layer_idx, (key, value_states), given))
        return given

    def end_prompt(self) -> None:
        """Say that the prompt is over: what is evicted leaves now, and not with the next token."""
        for layer in self.layers:
            layer.end_prompt()

    def start_from(self, other: SparseCache) -> None:
        """Take a copy of a prompt that another cache of the model has seen, and not ended.

        So that several methods go on from one prefill. The other cache remembers as many of the
        prompt's last queries as this method looks at, or more.
        """
        if self.binding.digest != other.binding.digest:
            raise UsageError("the other cache is of another model: the configs differ")
        for own, their in zip(self.layers, other.layers, strict=True):
            own.start_from(their)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back, given as a number below 0.

        Caches that choose can always do so. Caches that evict can for tokens behind which nothing
        was given up, and raise UsageError for others, before anything changes.
        """
        for layer in self.layers:
            layer.check_crop(-int(tokens_to_remove))
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, also after a forward that was interrupted."""
        self.binding.close()
        super().reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that is held into one safetensors file, and end an open prompt before.

        `gossamer.attention_cache(model, method, saved=path)` goes on from it.
        """
        self.end_prompt()
        files.save(path, self.layers, self.binding.digest, self.method)

    @property
    def result(self) -> CacheResult:
        """What was read and what is held; raises UsageError where no layer was reached."""
        return tallied(self.method, self.binding.names, self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def _check_order(self, index: int, new: int) -> None:
        """Raise UsageError unless the layers come one after another, each answered by us."""
        waiting = self.binding.close()
        if waiting is not None:
            raise UsageError(
                f"layer {waiting[0]} gave its keys to a cache made for a {self.binding.kind}, and "
                "its attention did not come for them: the cache is used with another model, or a "
                "forward was interrupted; reset the cache, or make one with gs.attention_cache"
            )
        if index >= len(self.layers):
            raise UsageError(
                f"layer {index} of a cache made for a {self.binding.kind} of {len(self.layers)} "
                "layers: it is used with another model"
            )
        if index and self.layers[index].seen + new != self.layers[0].seen:
            raise UsageError(
                f"layer {index} has seen {self.layers[index].seen} tokens before {new} new ones, "
                f"and layer 0 {self.layers[0].seen}: a forward was interrupted; reset the cache"
            )

    def _attend(
        self,
        index: int,
        arrived: tuple[Tensor, Tensor],
        given: tuple[Tensor, Tensor],
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
        """The attention of one layer's call, as transformers' AttentionInterface asks for it."""
        name = (self.binding.close() or (index, "sdpa"))[1]
        if key is not given[0] or not self.binding.holds(layer, index):
            raise UsageError(
                f"the cache's attention was called for layer {index} with keys that the cache did "
                "not hand out: it is used with another model, or a forward was interrupted"
            )
        check_arguments(index, dropout, others)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, *arrived)):
            raise UsageError("a sparse cache has no gradients: run the model in torch.no_grad()")
        query = query.to(value.dtype)
        held: SparseLayer = self.layers[index]
        real = real_tokens(attention_mask, query.shape[0], query.shape[2], held.seen, index)

        def dense(key: Tensor, value: Tensor) -> Tensor:
            known = {} if is_causal is None else {"is_causal": is_causal}
            found: Tensor = own_attention(layer, name)(
                layer, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                **known, **others,
            )[0]  # fmt: skip
            return found

        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = held.attend(Arrival(query, *arrived, real, scale, dense))
        return output.contiguous(), None


def keeper_of(method: Any, layer: int, layers: int) -> Keeper:
    """What makes the rows of a layer, for the kind of method this is."""
    for kind, keeper in _KEEPERS:
        if isinstance(method, kind):
            return keeper(method, layer, layers)
    raise UsageError(
        f"{type(method).__name__} keeps no cache: such a method evicts (kept_keys), chooses "
        "(summarise and score) or compresses (kept_entries); see gossamer methods attention"
    )


_KEEPERS: tuple[tuple[Any, Callable[..., Keeper]], ...] = (
    (KeyEvictor, EvictingKeeper),
    (KeySelector, SelectingKeeper),
    (KeyCompressor, CompressingKeeper),
)


def check_model(method: Any, model: nn.Module, layers: int) -> None:
    """Let a method refuse a model that it cannot serve."""
    if isinstance(method, type):
        raise UsageError(f"method is the class {method.__name__}; pass an instance of it")
    keeper_of(method, 0, layers)
    check = getattr(method, "check_model", None)
    if check is not None:
        config: Any = model.config
        config = (
            config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        )
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        check(heads, kv_heads, width, layers)
