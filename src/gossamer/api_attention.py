"""The front door of sparse attention, where a method may be given by its name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.engine.data import Batch
from gossamer.engine.inputs import attend as attending
from gossamer.engine.inputs import attention as engine
from gossamer.engine.inputs import calibrate
from gossamer.engine.inputs.protocols import (
    KeyEvictor,
    KeySelector,
    LearnsFromPrompts,
    PairChooser,
)
from gossamer.methods import build, find

if TYPE_CHECKING:
    from gossamer.engine.inputs.caches.cache import SparseCache


def sparse_attention(
    model: nn.Module | PruneResult | CompressResult,
    method: PairChooser | str,
    *,
    dense_below: int = engine.DENSE_BELOW,
    measure: bool = False,
) -> AbstractContextManager[engine.AttentionRun]:
    """Attention whose pairs a method chooses, in every layer of a model of transformers.

    For as long as the block is open, prompts of at least `dense_below` tokens are attended
    sparsely. Shorter ones run as the model runs them, bit for bit, and so does decoding, one token
    against a cache. Only the name of the attention in the model's configs changes. It is put back
    at the end, also after an error. Training works where attention has no dropout; the choice has
    no gradient. A batch with padding is attended one text after another, as if each came alone.

    Parameters
    ----------
    model : nn.Module
        Of transformers, with full attention through its AttentionInterface: Llama, Qwen, Mistral,
        Gemma, GPT-NeoX, BERT, ViT and many more.
    method : PairChooser or str
        Such as `gs.attention.BlockSparse(density=0.3)`, or its name with options.
    dense_below : int
        Prompts with fewer keys run dense. The default was measured with SmolLM2-135M on a CPU;
        0 makes every prompt sparse.
    measure : bool
        Compare each call with dense attention, computed in tiles: the share of attention that the
        chosen pairs hold, and the error of the outputs. It costs a dense call.

    Yields
    ------
    AttentionRun
        Its `result` has the layers reached, calls, measured density, operations and bytes, the
        choice included.

    Raises
    ------
    UsageError
        Before anything changes: for models with sliding windows, capped logits, sinks among their
        parameters, biases of positions, cross-attention or dropout in training; for a model that is
        in such a block already. At a call: for masks of four axes, packed sequences, attention
        weights as outputs. At the end: where no layer was reached.
    MissingExtra
        Without transformers.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...     num_attention_heads=2,
    ... )).eval()
    >>> ids = torch.arange(60).unsqueeze(0)
    >>> with gs.sparse_attention(model, "streamingllm:window=16", dense_below=0) as run:
    ...     logits = model(ids).logits
    >>> print(run.result.calls, run.result.density)
    1 0.5519125683060109
    """
    return engine.sparse_attention(
        unwrap(model), _chooser(method), dense_below=dense_below, measure=measure
    )


def attention_cache(
    model: nn.Module | PruneResult | CompressResult,
    method: KeyEvictor | KeySelector | str,
    *,
    saved: str | os.PathLike[str] | None = None,
) -> SparseCache:
    """A key-value cache of which a method keeps a part, or reads a part for each new token.

    Pass it as `past_key_values` to the model, to its own `generate`, or as `cache` to
    `gossamer.generate`. Prompts run as the model runs them, or as `sparse_attention` says. A prompt
    is over when its first single token comes.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, as for `sparse_attention`. The cache is for this
        model only.
    method : KeyEvictor, KeySelector or str
        Such as `gs.attention.SnapKV(tokens=1024)` or `gs.attention.Quest(density=0.1)`, or its name
        with options.
    saved : path, optional
        A file that `save` of such a cache wrote, to go on from. Model and method are the same.

    Returns
    -------
    SparseCache
        A transformers Cache. Its `result` has density, bytes read and bytes held.

    Raises
    ------
    UsageError
        For models that `sparse_attention` does not serve, encoders, methods that keep no cache or
        are not calibrated; for a file of another model or method. At a call: for a cache of another
        model.
    FormatError
        For a damaged file.
    MissingExtra
        Without transformers.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...     num_attention_heads=2,
    ... )).eval()
    >>> cache = gs.attention_cache(model, "streamingllm:window=16")
    >>> ids = gs.generate(model, torch.arange(60).unsqueeze(0), 5, eos=(), cache=cache)
    >>> cache.result.layers[0].rows
    20.0
    """
    try:
        from gossamer.engine.inputs.caches.cache import SparseCache
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    return SparseCache(unwrap(model), _chooser(method), saved)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: PairChooser | str,
    *,
    causal: bool,
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Attention of which a method chooses the pairs, for models of your own.

    Differentiable in query, key and value; the choice has no gradient. The queries are the last of
    the keys. A batch with padding is served one text after another, as if each came alone.

    Parameters
    ----------
    query : Tensor
        (batch, heads, queries, width), with positions rotated into it where the model does so.
    key, value : Tensor
        (batch, kv_heads, keys, width), not repeated for the query heads.
    method : PairChooser or str
        Such as `gs.attention.BlockSparse()`, or its name with options.
    causal : bool
        Whether a query sees no key behind its own position.
    scale : float, optional
        Factor of the products; 1 / sqrt(width) by default.
    padding : Tensor, optional
        bool (batch, keys): True for real tokens, False for padding, which is never looked at. The
        output of padding is 0.

    Returns
    -------
    Tensor
        (batch, heads, queries, value width), of the query's dtype.

    Raises
    ------
    UsageError
        Where the tensors do not fit each other, or the method cannot serve such a call.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> query, key = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    >>> gs.attend(query, key, key, "streamingllm:window=64", causal=True).shape
    torch.Size([1, 4, 300, 16])
    """
    return attending.attend(
        query, key, value, _chooser(method), causal=causal, scale=scale, padding=padding
    )


def calibrate_attention(
    model: nn.Module | PruneResult | CompressResult,
    method: LearnsFromPrompts | str,
    data: Iterable[Batch],
) -> Any:
    """Fit a method of attention that learns, such as SeerAttention, to a model.

    The model runs densely on the data and stays as it was.

    Parameters
    ----------
    model : nn.Module
        Of transformers, as for `sparse_attention`.
    method : LearnsFromPrompts or str
        Such as `gs.attention.SeerAttention()`, or its name with options.
    data : iterable of Tensor or dict
        Batches of prompts, as for `prune`; long ones teach most.

    Returns
    -------
    method
        A new method for `sparse_attention`.

    Raises
    ------
    UsageError
        Where the method learns nothing, or the model cannot be served.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...     num_attention_heads=2,
    ... )).eval()
    >>> data = [torch.randint(64, (1, 60)) for _ in range(2)]
    >>> method = gs.attention.SeerAttention(density=0.3, block=8, width=8, steps=10)
    >>> sorted(gs.calibrate_attention(model, method, data).gates)
    [0]
    """
    return calibrate.calibrate_attention(unwrap(model), _chooser(method), data)


def serves_prompts(method: str) -> bool:
    """Whether a method of attention chooses pairs of prompts; others keep or read caches."""
    return hasattr(type(_chooser(method)), "layout")


def _chooser(method: Any) -> Any:
    """A method by its name, which must be one of attention."""
    if not isinstance(method, str):
        return method
    found = find(method.partition(":")[0]).card
    if found.topic != "attention":
        raise UsageError(
            f"method {method!r} is one of {found.topic}; gossamer methods attention lists those "
            "that choose pairs of queries and keys, or keep caches"
        )
    return build(method)
