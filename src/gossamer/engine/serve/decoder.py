"""Compiled greedy decoding for Llama-style models: one call per token instead of one per layer.

The prompt goes through the model itself; its key-value cache is then copied, and every further
token is one call of the compiled step, which reads the model's own weights, dense or packed.
Activations, sums and the cache are float32, so a bfloat16 model rounds less here than under
transformers and may choose another token where two are within rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.matrix import why_not_plain
from gossamer.nn import BitmapLinear, NMLinear, QuantizedLinear
from gossamer.nn.chain import watched
from gossamer.nn.kernel_choice.decide import FAMILIES
from gossamer.ops._dispatch import compiled, isa_index, kernels
from gossamer.ops.nm import native as nm
from gossamer.ops.quantized import native as quantized

_ROPES = ("default", "linear", "llama3", "yarn")
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def refusal(model: nn.Module, capacity: int) -> str | None:
    """Why the compiled step cannot serve `capacity` positions of this model; None when it can."""
    found: Any = model
    if kernels() is None or isa_index() < 0:
        return "the compiled kernels are not in use"
    if type(model).__name__ not in FAMILIES:
        return f"{type(model).__name__} is none of {', '.join(FAMILIES)}"
    config = found.config
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"activation {config.hidden_act} is not silu"
    if found.model.rotary_emb.rope_type not in _ROPES:
        return f"rotary embedding of type {found.model.rotary_emb.rope_type}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and capacity > window:
        return f"{capacity} positions exceed the sliding window of {window}"
    for name, module in model.named_modules():
        if watched([module]):
            said = "has hooks or a forward of its own, which the compiled step would skip"
            return f"{name or 'the model'} {said}"
    for layer in _layers(found):
        for part in layer:
            if (reason := _unserved(part)) is not None:
                return reason
    return _unserved(found.lm_head)


def _unserved(part: nn.Module) -> str | None:
    if isinstance(part, QuantizedLinear):
        return None if part.values.is_cpu else f"weights on {part.values.device.type}"
    if not isinstance(part, BitmapLinear | NMLinear | nn.Linear):
        return f"a {type(part).__name__} in place of a linear layer"
    if isinstance(part, nn.Linear) and (reason := why_not_plain(part)) is not None:
        return f"a {type(part).__name__} in place of a linear layer: {reason}"
    weight = part.weight if isinstance(part, nn.Linear) else part.values
    if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_cpu:
        return f"weights of {weight.dtype} on {weight.device.type}"
    return None


def _layers(model: Any) -> list[list[nn.Module]]:
    """The seven matrices of every layer, in the order of `_MATRICES`."""
    return [
        [getattr(layer.self_attn, n) for n in _MATRICES[:4]]
        + [getattr(layer.mlp, n) for n in _MATRICES[4:]]
        for layer in model.model.layers
    ]


def _ready(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor as the compiled step reads it: contiguous and in `dtype`."""
    return tensor.detach().to(dtype or tensor.dtype).contiguous()


def _linear(part: nn.Module) -> Any:
    """A linear layer as the compiled step holds it, with its tensors."""
    if isinstance(part, QuantizedLinear):
        matrix = quantized.compiled_matrix(part.matrix)
    elif isinstance(part, NMLinear):
        matrix = nm.compiled_matrix(part.values, part.codes, part.layout)
    elif isinstance(part, BitmapLinear):
        columns = None if part.columns is None else _ready(part.columns)
        parts = [_ready(tensor) for tensor in (part.bitmap, part.values, part.row_ptr)]
        matrix = compiled().BitmapMatrix(*parts, columns, part.in_features)
    else:
        matrix = _ready(part.weight)  # type: ignore[arg-type]
    bias = None if part.bias is None else _ready(part.bias, torch.float32)  # type: ignore[arg-type]
    return compiled().Linear(matrix, bias)


class Decoder:
    """Greedy decoding of one sequence of at most `capacity` tokens; batch 1.

    Raises UsageError when `refusal` gives a reason. Memory: the model's weights are shared, not
    copied; the cache takes 8 * layers * capacity * kv_heads * head_dim bytes. A model that is
    changed after the decoder was made (other weights, dtype or layers) needs a new decoder.
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        if (reason := refusal(model, capacity)) is not None:
            raise UsageError(f"no compiled decoding: {reason}")
        self.model, self.capacity = model, capacity
        found: Any = model
        config, inner = found.config, found.model
        attention = inner.layers[0].self_attn
        dim = attention.head_dim
        kv_heads = config.num_key_value_heads
        positions = torch.arange(capacity).unsqueeze(0)
        cosines, sines = inner.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        self._step = compiled().Decoder(
            config.num_attention_heads,
            kv_heads,
            config.intermediate_size,
            inner.norm.variance_epsilon,
            attention.scaling,
            _ready(inner.embed_tokens.weight),
            _ready(cosines[0], torch.float32),
            _ready(sines[0], torch.float32),
            _ready(inner.norm.weight, torch.float32),
            _linear(found.lm_head),
        )
        self._cache = [torch.zeros(2, kv_heads, capacity, dim) for _ in inner.layers]
        for layer, parts, cache in zip(inner.layers, _layers(found), self._cache, strict=True):
            self._step.add_layer(
                _ready(layer.input_layernorm.weight, torch.float32),
                _ready(layer.post_attention_layernorm.weight, torch.float32),
                [_linear(part) for part in parts],
                cache[0],
                cache[1],
            )
        self._logits = torch.empty(found.lm_head.out_features)
        self.length = 0

    def prefill(self, ids: Tensor) -> Tensor:
        """Take in the prompt (1, tokens) through the model itself; its last logits (vocab,)."""
        if ids.shape[0] != 1 or ids.shape[1] > self.capacity:
            raise UsageError(f"a prompt is (1, up to {self.capacity}), not {tuple(ids.shape)}")
        found: Any = self.model
        output = found(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.length = ids.shape[1]
        for cache, layer in zip(self._cache, output.past_key_values.layers, strict=True):
            cache[0, :, : self.length] = layer.keys[0].float()
            cache[1, :, : self.length] = layer.values[0].float()
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def step(self, token: int) -> Tensor:
        """Append one token; the float32 logits (vocab,) after it, valid until the next step."""
        if self.length >= self.capacity:
            raise UsageError(f"the decoder holds {self.capacity} positions and is full")
        threads = torch.get_num_threads()
        self._step.step(token, self.length, self._logits, threads, isa_index())
        self.length += 1
        return self._logits
