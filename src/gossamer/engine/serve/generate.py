"""Greedy generation with a key-value cache for Hugging Face causal language models."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.engine import hooks
from gossamer.engine.data import device_of
from gossamer.engine.serve.decoder import Decoder, refusal
from gossamer.nn import BitmapLinear, NMLinear, QuantizedLinear


def generate(
    model: nn.Module | PruneResult | CompressResult,
    ids: Tensor,
    max_new_tokens: int,
    *,
    eos: int | Sequence[int] | None = None,
    compiled: bool | None = None,
    cache: Any = None,
) -> Tensor:
    """Continue each prompt with its most probable tokens, greedily.

    A sequence that reaches an end token is finished and filled with it. Generation ends once all
    are finished.

    Parameters
    ----------
    model : nn.Module, PruneResult or CompressResult
        A causal language model.
    ids : Tensor
        The prompts, int64 (batch, tokens).
    max_new_tokens : int
        How many tokens at most are added.
    eos : int or sequence of int, optional
        The end tokens. By default what the model's generation config, else its config, names. `()`
        or -1: go on in any case.
    compiled : bool, optional
        Take the compiled loop, which serves batch size 1 of Llama-style models on the CPU. By
        default it is taken where it serves a model with packed layers. In bfloat16 it rounds less
        than transformers do.
    cache : Cache, optional
        A cache of transformers for keys and values, such as `gossamer.attention_cache` makes. One
        that has seen a text already goes on from it: `ids` are what follows.

    Returns
    -------
    Tensor
        int64 (batch, tokens + new), with new <= max_new_tokens.

    Raises
    ------
    UsageError
        For an empty prompt, a length beyond the model's positions, and a model without a key-value
        cache. For encoder-decoders, whose own `generate` serves packed layers as well. With
        `compiled=True`, where the compiled loop does not serve the model, with the reason.

    Examples
    --------
    >>> import gossamer as gs, torch, transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = transformers.LlamaForCausalLM(config)
    >>> gs.generate(model, torch.tensor([[1, 2, 3]]), 5, eos=()).shape
    torch.Size([1, 8])
    """
    model = unwrap(model)
    past = _seen(cache, compiled)
    ids, ends = _check(model, ids, max_new_tokens, past), _ends(model, eos)
    if compiled is None:
        compiled = cache is None and compiled_serves(model, ids, max_new_tokens)
    if compiled:
        return _generate_compiled(model, ids, max_new_tokens, ends)
    finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    rows = [ids]
    with hooks.evaluating(model):
        step, given = ids, cache
        for _ in range(max_new_tokens):
            done = past + sum(row.shape[1] for row in rows) - step.shape[1]
            step, cache = next_token(model, step, cache, done)
            if given is not None and cache is not given:
                raise UsageError(f"{type(model).__name__} did not use the cache that it was given")
            if ends:  # a finished row repeats the token that ended it
                step = torch.where(finished.unsqueeze(1), rows[-1][:, -1:], step)
                finished |= torch.isin(step.squeeze(1), torch.tensor(ends, device=ids.device))
            rows.append(step)
            if ends and bool(finished.all()):
                break
    return torch.cat(rows, dim=1)


def _seen(cache: Any, compiled: bool | None) -> int:
    """Tokens that the cache holds already."""
    if cache is None:
        return 0
    if not callable(getattr(cache, "get_seq_length", None)):
        raise UsageError(f"cache is a Cache of transformers, not a {type(cache).__name__}")
    if compiled:
        raise UsageError("the compiled loop keeps a cache of its own: leave out compiled or cache")
    return int(cache.get_seq_length())


def compiled_serves(model: nn.Module, ids: Tensor, max_new_tokens: int) -> bool:
    """Whether `generate` takes the compiled loop by itself: packed layers, batch 1, served."""
    kinds = BitmapLinear | NMLinear | QuantizedLinear
    packed = any(isinstance(module, kinds) for module in model.modules())
    return packed and ids.shape[0] == 1 and refusal(model, ids.shape[1] + max_new_tokens) is None


def _generate_compiled(
    model: nn.Module, ids: Tensor, max_new_tokens: int, ends: Sequence[int]
) -> Tensor:
    if ids.shape[0] != 1:
        raise UsageError(f"compiled decoding serves batch 1, not {ids.shape[0]}")
    decoder = Decoder(model, ids.shape[1] + max_new_tokens)
    with hooks.evaluating(model):
        tokens = [int(decoder.prefill(ids).argmax())]
        while len(tokens) < max_new_tokens and tokens[-1] not in ends:
            tokens.append(int(decoder.step(tokens[-1]).argmax()))
    return torch.cat([ids, torch.tensor([tokens])], dim=1)


def _ends(model: nn.Module, eos: int | Sequence[int] | None) -> list[int]:
    """The tokens that end a text; none: it goes on."""
    if eos is None:
        configs = (getattr(model, name, None) for name in ("generation_config", "config"))
        named = (getattr(config, "eos_token_id", None) for config in configs)
        eos = next((found for found in named if found is not None), ())
    return [token for token in ([eos] if isinstance(eos, int) else eos) if token >= 0]


_ATTENDS = ("attention", "full_attention", "sliding_attention", "chunked_attention")


def _is_hybrid(model: nn.Module) -> bool:
    """Whether some of its layers attend and others keep a state."""
    config = getattr(model, "config", None)
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None)
    return any(kind not in _ATTENDS for kind in kinds or ())


def next_token(
    model: nn.Module, ids: Tensor, cache: Any, done: int | None = None
) -> tuple[Tensor, Any]:
    """The most probable token after `ids` (batch, new tokens), as (batch, 1), and the new cache.

    done: how many tokens the cache holds, which some hybrid models have to be told.
    """
    facts: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if done and _is_hybrid(model) and "position_ids" in signature(model.forward).parameters:
        # of these some, such as Bamba, take every call for the beginning of a text
        places = torch.arange(done, done + ids.shape[1], device=ids.device)
        facts["position_ids"] = places.expand(ids.shape)
    output = model(**facts)
    grown = getattr(output, "past_key_values", None)
    if grown is None:
        raise UsageError(f"{type(model).__name__} keeps no key-value cache, so it cannot decode")
    return output.logits[:, -1:].argmax(dim=-1), grown


def _check(model: nn.Module, ids: Tensor, max_new_tokens: int, past: int) -> Tensor:
    if ids.dim() != 2 or not ids.numel():
        raise UsageError(f"ids is a non-empty (batch, tokens) tensor, not {tuple(ids.shape)}")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is at least 1, not {max_new_tokens}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} is an encoder-decoder, which takes more than a prompt: call "
            "model.generate(...), which serves packed layers as well"
        )
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and past + ids.shape[1] + max_new_tokens > limit:
        raise UsageError(
            f"{past + ids.shape[1]} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"{limit} positions; shorten one of them"
        )
    return ids.to(device_of(model))
