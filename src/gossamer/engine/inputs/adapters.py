"""Adapters behind the attention of a frozen model, for as long as a block is open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.engine.calls import first_tensor
from gossamer.engine.hooks import adjust_outputs, watch_blocks
from gossamer.engine.inputs.servable import IMPLEMENTATION, attention_layers

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_OTHERS = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}


@contextmanager
def attention_adapters(
    model: nn.Module | PruneResult | CompressResult, adapters: Sequence[nn.Module] | nn.ModuleList
) -> Iterator[None]:
    """Put an adapter behind each attention of a model, and freeze the model.

    For as long as the block is open, hidden states pass `adapter(hidden, attention)` between a
    block's attention and its feed-forward network. The model runs eager attention, for the adapters
    need its weights. Names of attention and gradient flags are put back at the end, also after an
    error; no weight of the model is touched.

    Parameters
    ----------
    model : nn.Module
        Of transformers, with blocks like Llama's: attention, then feed-forward, each added to the
        hidden states. Mistral and Qwen are of this kind.
    adapters : sequence of nn.Module, or nn.ModuleList
        One for each attention, such as `gs.attention.SparseGIN`; train their parameters.

    Yields
    ------
    None

    Raises
    ------
    UsageError
        Before anything changes: for another number of adapters, or a model of another build. At a
        call: with a cache, which does not hold the hidden states of earlier tokens.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )).eval()
    >>> adapters = torch.nn.ModuleList(gs.attention.SparseGIN(32, 8) for _ in range(2))
    >>> with gs.attention_adapters(model, adapters):
    ...     loss = model(torch.arange(20).unsqueeze(0), labels=torch.arange(20).unsqueeze(0)).loss
    ...     loss.backward()
    >>> adapters[0].scale.grad is not None, model.lm_head.weight.grad
    (True, None)
    """
    model = unwrap(model)
    layers = attention_layers(model)
    if len(layers) != len(adapters):
        raise UsageError(f"{len(adapters)} adapters for {len(layers)} attention layers")
    blocks = [_block(model, name) for name in layers]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: vars(config).get(IMPLEMENTATION) for key, config in configs.items()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for config in configs.values():
            setattr(config, IMPLEMENTATION, "eager")
        model.requires_grad_(False)
        inputs: dict[int, Tensor] = {}

        def enter(index: int, given: Any) -> None:
            args, kwargs = given
            inputs[index] = first_tensor(args, kwargs, type(blocks[index]).__name__)

        adjusted = [
            (layer, partial(_corrected, adapter, inputs, index))
            for index, (layer, adapter) in enumerate(zip(layers.values(), adapters, strict=True))
        ]
        with watch_blocks(blocks, enter, lambda *_: None), adjust_outputs(adjusted):
            yield
    finally:
        for key, config in configs.items():
            setattr(config, IMPLEMENTATION, before[key])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _block(model: nn.Module, name: str) -> nn.Module:
    """The block that holds an attention; raises UsageError for one of another build."""
    block = model.get_submodule(name.rpartition(".")[0])
    children = {child for child, _ in block.named_children()}
    if not children >= _PARTS or children & _OTHERS:
        raise UsageError(
            f"{type(block).__name__} is not built like Llama's: attention added to the hidden "
            "states, then a norm and a feed-forward network"
        )
    return block


def _corrected(
    adapter: nn.Module, inputs: dict[int, Tensor], index: int, _: Tensor, output: Any
) -> Any:
    """Attention's output and weights, with what the adapter adds to the hidden states behind it."""
    before, (found, weights) = inputs.pop(index), output
    if weights is None or weights.shape[-1] != before.shape[1]:
        raise UsageError(
            "adapters of attention need all tokens at once: pass use_cache=False, and no "
            "past_key_values"
        )
    hidden = before + found
    return found + (adapter(hidden, weights) - hidden), weights
