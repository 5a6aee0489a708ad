"""What needs more than one layer of the library at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.result import unwrap
from gossamer.engine.data import Batch, read_batches
from gossamer.engine.evaluate import Measurable
from gossamer.engine.tasks import Outputs, Subject, Task, is_causal, reads_text, task_of
from gossamer.nn.costs import machine
from gossamer.report.comparison import Comparison


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

    data: held-out text, of which a causal language model is asked how many bits it needs per byte
    and how fast it decodes, an encoder of transformers how similar the embeddings of its lines
    stay and how many it encodes per second; or batches, as for `prune`, on which any other model's
    outputs are compared. tokenizer: of text, as transformers gives it; None where a byte is a
    token. tokens: to decode for the speed. progress: show how far it is on stderr.

    Speed is measured in rounds in which both models take turns; those in which others used the
    machine are taken again for some seconds, and counted where they had to stay.

    Raises UsageError where the models are of different kinds, the text is too short, or `tokens`
    exceed the model's positions; NonFiniteError where the models give no numbers.

    Example:

        fast = gs.compress(copy.deepcopy(model))
        report = gs.compare(model, fast, Path("held_out.txt").read_bytes(), tokenizer=tokenizer)
        print(report)
        report.save("report.html")
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
