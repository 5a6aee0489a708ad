"""The front door of sparse attention, where a method may be given by its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gossamer.core.denoising import TokenGrid
from gossamer.core.errors import MissingExtra, UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.engine.data import Batch
from gossamer.engine.inputs import attend as attending
from gossamer.engine.inputs import attention as engine
from gossamer.engine.inputs import calibrate, denoising
from gossamer.engine.inputs.protocols import (
    KeyEvictor,
    KeySelector,
    LearnsFromAnswers,
    LearnsFromPrompts,
    LearnsFromSteps,
    PairChooser,
    StepAttention,
)
from gossamer.methods import build, find

if TYPE_CHECKING:
    from gossamer.engine.inputs.caches.cache import SparseCache
    from gossamer.engine.inputs.caches.compressed import KeyCompressor


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
    method: KeyEvictor | KeySelector | KeyCompressor | str,
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
    method : KeyEvictor, KeySelector, KeyCompressor or str
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
    method: LearnsFromPrompts | LearnsFromAnswers | str,
    data: Iterable[Batch],
) -> Any:
    """Fit a method of attention that learns, such as SeerAttention or MoA, to a model.

    The model runs densely on the data and stays as it was. For a method that learns from answers,
    such as MoA, it writes an answer to each prompt and the gradients of its loss are taken.

    Parameters
    ----------
    model : nn.Module
        Of transformers, as for `sparse_attention`.
    method : LearnsFromPrompts, LearnsFromAnswers or str
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
        Where the method learns nothing, the model cannot be served, or it cannot write answers
        where those are needed.

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


def sparse_denoising(
    model: nn.Module | PruneResult | CompressResult | None,
    method: StepAttention | PairChooser | str,
    *,
    steps: int,
    grid: TokenGrid | None = None,
    measure: bool = False,
) -> AbstractContextManager[denoising.DenoisingRun]:
    """Sparse self-attention inside a diffusion model, which follows its denoising steps.

    For as long as the block is open, calls of torch's `scaled_dot_product_attention` inside the
    model's forward go to the method; nothing of the model is changed. So models of diffusers, of
    transformers with sdpa, and your own are served. Cross-attention is left as it is. Attention that
    a forward does not run itself, such as gradient checkpointing in the backward, is not reached.
    States are kept for each layer and branch; a new run begins without any.

    Parameters
    ----------
    model : nn.Module or None
        The denoiser. None for code that calls `run.attend` itself.
    method : StepAttention, PairChooser or str
        Such as `gs.attention.AdaSpa()`, or its name with options. A chooser of prompts that serves
        attention to both sides, such as BlockSparse, chooses anew in each call.
    steps : int
        How many denoising steps a run has.
    grid : TokenGrid, optional
        How the tokens lie, for methods that go by frames or text. Only calls with so many queries
        are then the method's.
    measure : bool
        Compare each call with dense attention on the same inputs and count the operations of the
        choice. It costs a dense call.

    Yields
    ------
    DenoisingRun
        Call `run.step(number)` before the model in every step; `run.result` has layers, calls,
        densities, states and reuse.

    Raises
    ------
    UsageError
        At a call: without a named step, and for causal or masked self-attention. At the end: where
        no layer was reached, or every call of a whole run was dense.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> method = gs.attention.BlockSparse(block=8, density=0.5)
    >>> with gs.sparse_denoising(None, method, steps=2) as run:
    ...     for number in range(2):
    ...         run.step(number)
    ...         x = torch.randn(1, 2, 64, 8)
    ...         output = run.attend(x, x, x, layer=0)
    >>> print(run.result.calls, run.result.density)
    2 0.5
    """
    return denoising.sparse_denoising(
        None if model is None else unwrap(model),
        _chooser(method), steps=steps, grid=grid, measure=measure,
    )  # fmt: skip


def calibrate_denoising(
    model: nn.Module | PruneResult | CompressResult | None,
    method: LearnsFromSteps | str,
    sample: Callable[[denoising.DenoisingRun], object],
    *,
    steps: int,
    grid: TokenGrid | None = None,
) -> Any:
    """Fit a method of attention that learns from samples, such as SparseVDiT, to a diffusion model.

    The model runs densely and stays as it was.

    Parameters
    ----------
    model : nn.Module or None
        As for `sparse_denoising`.
    method : LearnsFromSteps or str
        Such as `gs.attention.SparseVDiT()`, or its name with options.
    sample : callable
        Given a run, draws a few samples, with `run.step(number)` before the model in every step.
    steps : int
        How many denoising steps a run has.
    grid : TokenGrid, optional
        How the tokens lie.

    Returns
    -------
    method
        A new method for `sparse_denoising`.

    Raises
    ------
    UsageError
        Where the method learns nothing, or no layer was reached.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> def sample(run):
    ...     for number in range(2):
    ...         run.step(number)
    ...         x = torch.randn(1, 2, 64, 8)
    ...         run.attend(x, x, x, layer=0)
    >>> grid = gs.TokenGrid(4, 4, 4)
    >>> method = gs.calibrate_denoising(None, "sparsevdit", sample, steps=2, grid=grid)
    >>> len(method.modes[0])
    2
    """
    found = None if model is None else unwrap(model)
    return denoising.calibrate_denoising(found, _chooser(method), sample, steps=steps, grid=grid)


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
