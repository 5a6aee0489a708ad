"""Adapters behind the attention of a frozen model, for as long as a block is open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.engine.hooks import adjust_attention
from gossamer.engine.inputs.servable import IMPLEMENTATION, attention_layers

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_OTHERS = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}


@contextmanager
def attention_adapters(
    model: nn.Module | PruneResult | CompressResult, adapters: Sequence[nn.Module]
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
    adapters : sequence of nn.Module
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
        parts = zip(blocks, layers.values(), map(_correction, adapters), strict=True)
        with adjust_attention(list(parts)):
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


def _correction(adapter: nn.Module) -> Any:
    """attention's output with what the adapter adds to the hidden states behind it."""

    def corrected(before: Tensor, output: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None or weights.shape[-1] != before.shape[1]:
            raise UsageError(
                "adapters of attention need all tokens at once: pass use_cache=False, and no "
                "past_key_values"
            )
        hidden = before + output
        return output + (adapter(hidden, weights) - hidden)

    return corrected
