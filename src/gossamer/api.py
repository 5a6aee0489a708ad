"""What needs more than one layer of the library at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, cast

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.pattern import Pattern, parse_pattern
from gossamer.core.result import PruneResult, unwrap
from gossamer.core.words import build
from gossamer.engine.data import Batch, read_batches
from gossamer.engine.measure.evaluate import Measurable
from gossamer.engine.measure.tasks import Outputs, Subject, Task, is_causal, reads_text, task_of
from gossamer.engine.protocols import Allocation, Method, Planner
from gossamer.engine.prune import run as engine
from gossamer.engine.prune.widths import prune_widths
from gossamer.methods import build as build_method
from gossamer.methods import parts as method_parts
from gossamer.nn.kernel_choice.machine import machine
from gossamer.ops.allocation import ALLOCATIONS
from gossamer.report.comparison import Comparison


def prune(
    model: nn.Module | PruneResult,
    method: Method | Planner | str,
    *,
    pattern: Pattern | str | None = None,
    density: float | None = None,
    sparsity: float | None = None,
    allocation: Allocation | str | None = None,
    data: Iterable[Batch] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    uncalled: Literal["dense", "error"] = "dense",
    keep_zeros: bool = False,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> PruneResult:
    """Prune `model` in place and return it with its supports and figures.

    Every matrix is pruned that Gossamer can prune. Left out are embeddings, output heads, routers
    of mixtures, adapters, tied weights, and layers whose forward is their own. Blocks are pruned in
    order. Each one's statistics come from its already pruned predecessors, and only one block's
    statistics are in memory. Training flags and hooks are left as they were.

    A planner, such as `Widths()`, cuts whole neurons and heads out of a model of transformers. It
    writes the new widths into the config, so plain transformers saves and loads the result. It
    takes density or sparsity alone.

    Parameters
    ----------
    model : nn.Module or PruneResult
        Changed in place.
    method : Scorer, Solver, Planner or str
        A method, or its name with options: `"wanda"`, `"sparsegpt:block=64,damping=0.02"`.
    pattern : Pattern or str, optional
        Which weights are zero together: `gs.NM(2, 4)` or `"2:4"`. By default the method's own.
    density : float, optional
        The fraction kept, in (0, 1]. May be left out for N:M.
    sparsity : float, optional
        The fraction removed, in [0, 1), instead of `density`.
    allocation : Allocation or str, optional
        How one density becomes one per layer, such as `gs.ERK()` or `"erk"`. `Uniform()` by
        default.
    data : iterable of Tensor or dict, optional
        Batches for a method or allocation that needs statistics. A tensor is called as
        `model(batch)`, a dict as `model(**batch)`. Positions where `attention_mask` is 0 do not
        count; in a decoder, those where `decoder_attention_mask` is 0.
    include, exclude : sequence of str
        `fnmatch` patterns on dotted names that add weights and remove them.
    uncalled : {"dense", "error"}
        What becomes of weights that the data never reaches.
    keep_zeros : bool
        Weights that are zero before stay zero, also where a method repairs what it keeps.
    journal : path, optional
        A folder in which each finished block is kept. The same call on the same dense model resumes
        there, and ends with the same bits.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    PruneResult
        The model, its supports, and the requested and measured figures. `coverage` says how much of
        the model was pruned, and names every other matrix with the reason. Where that is little or
        unusual, the logger `gossamer` warns.

    Raises
    ------
    UsageError, PatternError, NonFiniteError
        For bad arguments, patterns that do not fit, weights that hold NaN or are recomputed at
        every forward, and data that reaches nothing. Nothing is changed then. A later error, such
        as NaN activations in a later block or a full disk, leaves the blocks before it pruned.
    FormatError
        For a damaged journal.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> data = [torch.randn(16, 64) for _ in range(4)]
    >>> result = gs.prune(model, gs.weights.SparseGPT(), pattern="2:4", data=data)
    >>> result.measured_density
    0.5
    """
    if isinstance(method, str):
        method = _pruner(method)
    if sparsity is not None:
        density = _density_of(sparsity, density)
    if isinstance(method, Planner) and not isinstance(method, type):
        others = {"pattern": pattern, "allocation": allocation, "data": data, "include": include,
                  "exclude": exclude, "keep_zeros": keep_zeros, "journal": journal}  # fmt: skip
        return _prune_widths(unwrap(model), method, density, others)
    if isinstance(pattern, str):
        pattern = parse_pattern(pattern)
    if isinstance(allocation, str):
        allocation = cast(Allocation, build(allocation, ALLOCATIONS, "allocation"))
    return engine.prune(
        unwrap(model), cast(Method, method), pattern=pattern, density=density, allocation=allocation, data=data,
        include=include, exclude=exclude, uncalled=uncalled, keep_zeros=keep_zeros,
        journal=journal, progress=progress,
    )  # fmt: skip


def _pruner(text: str) -> Method | Planner:
    role = method_parts(text)[0].card.role
    if role == "replacer":
        raise UsageError(f"method {text!r} replaces layers; use gs.replace_layers")
    if role == "gradient_source":
        raise UsageError(f"method {text!r} trains; use gs.EstimatedGradients in a training loop")
    if role == "key_scorer":
        raise UsageError(f"method {text!r} chooses keys, not weights; use gs.sparse_attention")
    if role not in ("scorer", "solver", "planner"):
        raise UsageError(
            f"method {text!r} chooses weights while a model trains; use gs.sparse_training in a "
            "training loop, or a method for trained models here (see gs.cards())"
        )
    return cast(Method, build_method(text))


def _prune_widths(
    model: nn.Module, planner: Planner, density: float | None, others: Mapping[str, Any]
) -> PruneResult:
    """Cut neurons and heads out; raises UsageError for options of pruning single weights."""
    for name, value in others.items():
        if value is not None and value != () and value is not False:
            raise UsageError(
                f"{planner.card.name} cuts whole neurons and heads, the same number in every "
                f"layer, so {name} cannot apply; leave it out"
            )
    if density is None:
        raise UsageError(f"{planner.card.name} needs a density, the fraction of units kept")
    return prune_widths(model, planner, density)


def _density_of(sparsity: float, density: float | None) -> float:
    if density is not None:
        raise UsageError("give density, the fraction kept, or sparsity, the fraction removed")
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0.0 <= sparsity < 1.0:
        raise UsageError(f"sparsity is the fraction removed, in [0, 1), not {sparsity!r}")
    return round(1.0 - sparsity, 12)


def compare(
    dense: Measurable,
    sparse: Measurable,
    data: bytes | str | Iterable[Batch],
    *,
    tokenizer: Any = None,
    tokens: int = 64,
    progress: bool = False,
) -> Comparison:
    """Measure two models side by side: quality, bytes, and speed in turns in one process.

    Speed is measured in rounds in which both models take turns. Rounds in which others used the
    machine are taken again for some seconds, and counted where they had to stay.

    Parameters
    ----------
    dense, sparse : nn.Module, PruneResult or CompressResult
        Two models of one kind.
    data : str, bytes, or iterable of Tensor or dict
        Held-out text, or batches as for `prune`. On text a causal language model is asked how many
        bits it needs per byte, and how fast it decodes. A text encoder is asked how similar the
        embeddings of its lines stay, and how many it encodes per second. On batches any other model
        is asked how similar its outputs stay.
    tokenizer : optional
        Of text, as transformers gives it. None where a byte is a token.
    tokens : int
        How many tokens are decoded for the speed.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    Comparison
        The figures of both models. It prints as a table and saves as HTML or JSON.

    Raises
    ------
    UsageError
        Where the models are of different kinds, the text is too short, or `tokens` exceed the
        model's positions.
    NonFiniteError
        Where a model's outputs are not numbers.

    Examples
    --------
    >>> import copy, gossamer as gs, torch
    >>> dense = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    >>> fast = gs.compress(gs.prune(copy.deepcopy(dense), "magnitude", density=0.2), latency="rule")
    >>> report = gs.compare(dense, fast, [torch.randn(8, 256) for _ in range(4)])
    >>> report.bytes["sparse"] < report.bytes["dense"]
    True
    """
    first, second = unwrap(dense), unwrap(sparse)
    task = _task(first, second, data, tokenizer, tokens, progress)
    quality = {
        "metric": task.metric,
        "better": task.better,
        "dense": task.quality(first, first),
        "sparse": task.quality(first, second),
    }
    speed = asdict(task.speed(first, second, tokens))
    sizes = {"dense": _stored(first), "sparse": _stored(second)}
    return Comparison(quality, sizes, speed, machine())


def _task(
    dense: nn.Module, sparse: nn.Module, data: Any, tokenizer: Any, tokens: int, progress: bool
) -> Task | Outputs:
    if tokens < 1:
        raise UsageError(f"tokens is at least 1, not {tokens}")
    causal = is_causal(dense)
    if causal != is_causal(sparse):
        raise UsageError("one is a causal language model and the other is not")
    if not isinstance(data, bytes | str):
        if causal:
            raise UsageError("a language model is compared on text: give data as bytes or str")
        return Outputs(tuple(read_batches(data)), progress)
    if not causal and tokenizer is None:
        raise UsageError("an encoder reads text by its tokenizer: pass tokenizer=, or batches")
    if not causal and not reads_text(dense):
        raise UsageError(f"{type(dense).__name__} reads no text: give data as batches")
    vocabulary = getattr(getattr(dense, "config", None), "vocab_size", 0)
    if tokenizer is None and vocabulary > 256:
        raise UsageError(f"a vocabulary of {vocabulary} needs its tokenizer: pass tokenizer=")
    text = data.encode() if isinstance(data, str) else data
    task = task_of(Subject(dense, tokenizer, causal), text, progress)
    task.check(2, tokens)
    return task


def _stored(model: nn.Module) -> int:
    """Bytes of the state dict, tied tensors once."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(sizes.values())
