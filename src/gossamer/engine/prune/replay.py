"""Running a model's blocks one after the other, each with the arguments that the model gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.engine import hooks
from gossamer.engine.calls import Inputs

_NUMERIC = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)
"""What a block may raise on arguments that do not suit it."""


class Trace:
    """The calls of blocks in one forward pass: the arguments of each, and whether each block's
    output is the next one's input. `keep`: also every hidden state, which `replays` needs."""

    def __init__(self, count: int, keep: bool) -> None:
        self.arguments: list[Inputs] = []
        self.hidden: list[Tensor] = []
        self.whole = count > 0
        self.fixed = True
        """Whether every block was given only tensors that the first block was given too."""
        self._count, self._keep, self._called = count, keep, 0
        self._output: Any = None
        self._first: set[int] = set()

    def before(self, index: int, inputs: Inputs) -> None:
        """Note one block's inputs."""
        hidden = hidden_of(inputs)
        if not self.whole or hidden is None or index != self._called or _opaque(inputs):
            self._break()
            return
        if index and not _same(self._output, hidden):
            self._break()
            return
        arguments = with_hidden(inputs, None)
        tensors = {id(tensor) for tensor in _tensors(arguments)}
        self._first = self._first if index else tensors
        self.fixed = self.fixed and tensors <= self._first
        self.arguments.append(arguments)
        if self._keep or not index:
            self.hidden.append(hidden.clone())  # the block, or the model, may work in place

    def after(self, index: int, output: Any) -> None:
        """Note one block's output."""
        self._called += 1
        self._output = first_of(output)
        if self.whole and self._keep and self._called == self._count:
            last = self._output
            self.hidden.append(last.clone() if isinstance(last, Tensor) else torch.empty(0))

    def close(self) -> None:
        """The pass has ended."""
        self._output = None
        if self._called != self._count:
            self._break()

    def _break(self) -> None:
        self.whole = False
        self.arguments, self.hidden = [], []


def replays(blocks: Sequence[nn.Module], trace: Trace, again: Callable[[], object]) -> bool:
    """Whether each block, run on what the trace holds, gives what it gave inside of the model.

    Also that no argument depends on what the blocks compute, as those would change under pruning:
    `again()` runs the model once more, with the first block's output disturbed.
    """
    if not trace.whole:
        return False
    try:
        for index, block in enumerate(blocks):
            output = run_block(block, trace.arguments[index], trace.hidden[index])
            if not _close(output, trace.hidden[index + 1]):
                return False
        if trace.fixed:
            return True
        other: list[Inputs] = []
        watch = hooks.watch_blocks(
            blocks, lambda _, inputs: other.append(with_hidden(inputs, None)), lambda *_: None
        )
        with watch, hooks.adjust_outputs([(blocks[0], _disturb)]):
            again()
    except _NUMERIC:
        return False
    return _equal(trace.arguments, other)


def _disturb(_: Tensor, output: Any) -> Any:
    hidden = first_of(output)
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        return output
    ramp = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device).to(hidden.dtype)
    moved = hidden + ramp * hidden.float().std().to(hidden.dtype)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


def run_block(block: nn.Module, arguments: Inputs, hidden: Tensor) -> Any:
    """The block's new hidden state; the old one is copied, so in-place layers cannot spoil it."""
    args, kwargs = with_hidden(arguments, hidden.clone())
    return first_of(block(*args, **kwargs))


def first_of(output: Any) -> Any:
    """The hidden state that a block returns, alone or at the head of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def hidden_of(inputs: Inputs) -> Tensor | None:
    """The hidden state that a block is called with: its first argument."""
    args, kwargs = inputs
    value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return value if isinstance(value, Tensor) else None


def with_hidden(inputs: Inputs, hidden: Any) -> Inputs:
    """The same arguments with another hidden state."""
    args, kwargs = inputs
    if args:
        return (hidden, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "hidden_states")
    return args, {**kwargs, name: hidden}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def _opaque(inputs: Inputs) -> bool:
    """Whether an argument is an object that a block could change, such as a cache."""
    plain = (Tensor, int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size)
    return any(not isinstance(leaf, plain) for leaf in _leaves(inputs))


def _same(a: Any, b: Tensor) -> bool:
    return a is b or (
        isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    )


def _equal(a: Any, b: Any) -> bool:
    first, second = list(_tensors(a)), list(_tensors(b))
    return len(first) == len(second) and all(map(_same, first, second))


def _close(output: Any, wanted: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.shape != wanted.shape:
        return False
    if not wanted.numel():
        return True
    tolerance = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 2e-2
    difference = (output.float() - wanted.float()).abs().max()
    return not bool(difference > tolerance * wanted.float().abs().max())
