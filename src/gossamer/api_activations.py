"""The front door of activation sparsity, where a method may be given by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.engine.data import Batch
from gossamer.engine.inputs.activations import calibrate, correct, restore, run
from gossamer.engine.inputs.activations.plan import ActivationPlan, read_plan
from gossamer.methods import build, find


def sparsify_activations(
    model: nn.Module | PruneResult | CompressResult,
    method: Any,
    data: Iterable[Batch] | None = None,
    *,
    density: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    prefill: Literal["dense", "sparse"] = "dense",
    simulate: bool = False,
    break_even: float | None = None,
    loss: bool = True,
    progress: bool = False,
) -> AbstractContextManager[Any]:
    """Multiply only some inputs of each linear layer, chosen for each token by a method.

    For as long as the block is open, the weights of skipped inputs are not read. Each weight is
    held once, column by column; at the end it lies as it was, bit for bit, also after an error.
    A call of one token runs behind the kernel. One of up to 8 tokens does where that reads less
    than the whole weight, each token with its own inputs. A longer one, a prompt, runs dense: at
    many tokens the union of their inputs is nearly everything, so nothing would be saved, and the
    quality of the prompt would be lost.

    Parameters
    ----------
    model : nn.Module
        With linear layers, on the CPU in float32 or bfloat16.
    method : InputScorer, ActivationPlan or str
        Such as `gs.activations.TEAL(density=0.5)`, its name with options, or what
        `calibrate_activations` found.
    data : iterable of Tensor or dict, optional
        Batches to calibrate with, as for `prune`. Not needed with a plan.
    density : float, optional
        The fraction of weights that a token reads, in place of the method's own.
    include, exclude : sequence of str
        `fnmatch` patterns on dotted names: further layers, such as `lm_head`, and layers to leave
        dense.
    prefill : {"dense", "sparse"}
        Whether calls of more than 8 tokens choose inputs as well. "sparse" multiplies masks, which
        saves no time; it measures what decoding costs in quality.
    simulate : bool
        Multiply masks everywhere, on any device and dtype and with gradients. It saves no time.
    break_even : float, optional
        Layers that would read at least this fraction of their weights stay dense; infinity keeps
        none dense. By default it is timed, for each shape.
    loss : bool
        Also measure the loss of up to four batches of the data, dense and with every token's inputs
        chosen.
    progress : bool
        Show how far calibration is on stderr.

    Yields
    ------
    ActivationRun or NeuronRun
        Its `result` has the measured density of each layer, unions, how calls ran, and bytes. The
        `plan` of an ActivationRun has thresholds and the path of the allocation. A NeuronRun comes
        from methods that choose neurons by prompt, such as `CoreInfer`, which take no data.

    Raises
    ------
    UsageError
        Before anything changes: for a method that needs data and has none, too little data, a model
        without the layers that a method needs, a plan of another model, weights that no kernel
        reads. At the end: where no layer was called.
    NonFiniteError
        Where calibration sees NaN or infinity.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    >>> data = [torch.randn(200, 64)]
    >>> with torch.no_grad(), gs.sparsify_activations(
    ...     model, "teal:density=0.5,allocation=uniform", data, break_even=1.0
    ... ) as run:
    ...     y = model(torch.randn(1, 64))
    >>> run.result.ways
    {'one token': 2}
    """
    return run.sparsify_activations(
        unwrap(model), method_of(method), data, density=density, include=include, exclude=exclude,
        prefill=prefill, simulate=simulate, break_even=break_even, loss=loss, progress=progress,
    )  # fmt: skip


def calibrate_activations(
    model: nn.Module | PruneResult | CompressResult,
    method: Any,
    data: Iterable[Batch] | None = None,
    *,
    density: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: bool = False,
) -> ActivationPlan:
    """Find which inputs the layers of a model keep; the model stays as it is.

    Parameters
    ----------
    model, method, data, density, include, exclude, progress
        As in `sparsify_activations`.

    Returns
    -------
    ActivationPlan
        For `sparsify_activations` and `compress`; `plan.save("thresholds.json")` keeps it.

    Raises
    ------
    UsageError, NonFiniteError
        As `sparsify_activations` does.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    >>> plan = gs.calibrate_activations(
    ...     model, "teal:density=0.25,allocation=uniform", [torch.randn(200, 64)]
    ... )
    >>> plan.density
    0.25
    """
    return calibrate.calibrate_activations(
        unwrap(model), method_of(method), data, density=density, include=include, exclude=exclude,
        progress=progress,
    )  # fmt: skip


def generate_corrected(
    model: nn.Module | PruneResult | CompressResult,
    method: Any,
    ids: Tensor,
    max_new_tokens: int,
    data: Iterable[Batch] | None = None,
    *,
    eos: Sequence[int] = (),
    break_even: float | None = None,
) -> correct.CorrectedResult:
    """Continue a prompt greedily by a sparse model whose own dense weights check every few tokens.

    A check reads all tokens since the last one at once, refreshes their keys and values, and takes
    back what follows the first unlikely one.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers.
    method : Sirius or str
        Such as `gs.activations.Sirius(start=gs.activations.TEAL(0.4))`.
    ids : Tensor
        One prompt, int64 (1, tokens).
    max_new_tokens : int
        How many tokens at most are added.
    data : iterable of Tensor or dict, optional
        What `method.start` is calibrated with, as in `sparsify_activations`.
    eos : sequence of int
        Tokens that end the text.
    break_even : float, optional
        As in `sparsify_activations`.

    Returns
    -------
    CorrectedResult
        The text, checks, and the density that they leave.

    Raises
    ------
    UsageError
        For more than one prompt, and a cache that cannot be rolled back.

    Examples
    --------
    >>> import gossamer as gs, torch, transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> model, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
    >>> method = gs.activations.Sirius(gs.activations.CoreInfer(), accept=1)
    >>> found = gs.generate_corrected(model, method, ids, 5)
    >>> torch.equal(found.ids, gs.generate(model, ids, 5, eos=()))
    True
    """
    return correct.generate_corrected(
        unwrap(model), method_of(method), ids, max_new_tokens, data, eos=eos, break_even=break_even
    )


def load_activations(
    path: str | Path, model: nn.Module | PruneResult | CompressResult
) -> ActivationPlan:
    """Read the thresholds that `ActivationPlan.save` wrote, for the model they were made with.

    Norms, rotations and low-rank parts are derived from the model's weights again.

    Parameters
    ----------
    path : path
        The JSON file.
    model : nn.Module
        The model.

    Returns
    -------
    ActivationPlan
        For `sparsify_activations` and `compress`.

    Raises
    ------
    FormatError
        Where the file is none of thresholds.
    UsageError
        Where they are of another model.

    Examples
    --------
    >>> import gossamer as gs, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> plan = gs.calibrate_activations(model, "teal:allocation=uniform", [torch.randn(200, 64)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = gs.load_activations(plan.save(f"{folder}/thresholds.json"), model)
    >>> again.layers["0"].budget == plan.layers["0"].budget
    True
    """
    data = read_plan(path)
    return restore.restored(unwrap(model), data, method_of(data["method"]))


def method_of(method: Any) -> Any:
    """A method that may be given by its name, which must be one of activations."""
    if not isinstance(method, str):
        return method
    found = find(method.partition(":")[0]).card
    if found.topic != "activations":
        raise UsageError(
            f"method {method!r} is one of {found.topic}; gossamer methods activations lists those "
            "that choose inputs of layers"
        )
    return build(method)
