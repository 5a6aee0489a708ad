"""Sparse attention inside diffusion models, for as long as a block is open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.core.attention import AttentionCall
from gossamer.core.card import Card
from gossamer.core.denoising import Attended, DenoisingStep, TokenGrid
from gossamer.core.errors import UsageError
from gossamer.core.result import unwrap
from gossamer.engine.hooks import around_forward, evaluating
from gossamer.engine.inputs.attend import check_answered, check_shapes, choose, run_layout
from gossamer.engine.inputs.counting import full_layout, pairs, possible_pairs, worked
from gossamer.engine.inputs.denoise_tally import DenoiseTally, DenoisingResult
from gossamer.engine.inputs.protocols import LearnsFromSteps, PairChooser, StepAttention

Key = tuple[str, int]


class DenoisingRun:
    """What a block of `sparse_denoising` yields: told of every step, it serves attention.

    `result` tells what has happened so far.
    """

    def __init__(
        self, method: StepAttention, steps: int, grid: TokenGrid | None, measure: bool
    ) -> None:
        self._method, self._steps, self._grid, self._measure = method, steps, grid, measure
        self._states: dict[Key, Any] = {}
        self._shapes: dict[Key, tuple[int, ...]] = {}
        self._tally = DenoiseTally()
        self._step: DenoisingStep | None = None
        self._given: set[str] = set()
        self._next = self._most = 0

    @property
    def result(self) -> DenoisingResult:
        """The figures of all calls so far."""
        self._tally.held(self._states)
        return self._tally.result(repr(self._method))

    def step(self, number: int, branch: str = "") -> None:
        """Say which denoising step comes now, before the model is called.

        Parameters
        ----------
        number : int
            The step, from 0. 0, and a number below the last one, begin a new run without any
            state.
        branch : str
            Which of several forwards of a step, such as `text` and `none` in guidance.
        """
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(f"a step is a whole number, not {number!r}")
        if not 0 <= number < self._steps:
            raise UsageError(
                f"a run of {self._steps} steps has 0 to {self._steps - 1}, not {number}"
            )
        last = None if self._step is None else self._step.number
        again = last == number and branch in self._given
        if again and number:
            raise UsageError(
                f"step {number} of branch {branch!r} came twice; call run.reset() to begin a new run"
            )
        if last is None or number < last or again:
            self.reset()
            self._tally.runs += 1
        if last != number or again:
            self._given = set()
        self._given.add(branch)
        self._tally.held(self._states)
        self._step = DenoisingStep(number, self._steps, branch, self._grid)

    def reset(self) -> None:
        """Forget every state; the next step begins a new run."""
        self._tally.held(self._states)
        self._states.clear()
        self._shapes.clear()
        self._given = set()
        self._step = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float | None = None
    ) -> Tensor:
        """Attention of one layer at the present step, for models of your own.

        Parameters
        ----------
        query : Tensor
            (batch, heads, queries, width), with positions rotated into it where the model does so.
        key, value : Tensor
            (batch, kv_heads, keys, width).
        layer : int
            The layer's number, from 0; each has states of its own.
        scale : float, optional
            Factor of the products; 1 / sqrt(width) by default.

        Returns
        -------
        Tensor
            (batch, heads, queries, value width).
        """
        check_shapes(query, key, value, None)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._most = max(self._most, layer + 1)
        return self._served(AttentionCall(query, key, value, scale, False, layer, self._most))

    def wants(self, queries: int, keys: int) -> bool:
        """Whether a call of such lengths is the method's; others stay as they are."""
        if self._grid is not None and queries != self._grid.tokens:
            return False
        if queries == keys:
            return True
        return keys > queries and bool(getattr(self._method, "autoregressive", False))

    def begin_forward(self) -> None:
        """The model's forward begins, and with it its first layer."""
        self._next = 0

    def end_forward(self) -> None:
        """The forward is over."""
        self._most = max(self._most, self._next)

    def intercept(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In place of torch's scaled_dot_product_attention."""
        if query.dim() != 4 or not self.wants(query.shape[2], key.shape[2]):
            self._tally.passed[query.shape[-2], key.shape[-2]] += 1
            return nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        layer, self._next = self._next, self._next + 1
        for bad, what in (
            (is_causal, "is causal, and denoising attends to both sides"),
            (dropout_p > 0, "drops attention weights; set its dropout to 0"),
            (attn_mask is not None and not _all_true(attn_mask), "has a mask, which is not served"),
        ):
            if bad:
                raise UsageError(f"attention layer {layer} {what}")
        return self.attend(query, key, value, layer=layer, scale=scale)

    def _served(self, call: AttentionCall) -> Tensor:
        step = self._step
        if step is None:
            raise UsageError(
                "attention was called before a step was named: call run.step(number) before the "
                "model in every denoising step"
            )
        key = (step.branch, call.layer)
        shape = (*call.query.shape[:2], call.query.shape[3], *call.key.shape[:2])
        if self._shapes.setdefault(key, shape) != shape:
            raise UsageError(
                f"layer {call.layer} is called with shape {shape} after {self._shapes[key]} in one "
                "run; call run.reset() to begin a new run, or name branches in run.step"
            )

        def answer() -> Attended:
            return self._method.attend(call, step, self._states.get(key))

        if not self._measure:
            found = answer()
        else:
            found, work = worked(answer)
            with torch.no_grad():
                dense = run_layout(call, full_layout(call))[0]
                self._tally.measured(call, found, work, dense)
        self._states[key] = found.state
        self._tally.served(call, found)
        return found.output

    def check(self, sparse: bool) -> None:
        """Raise UsageError where no layer was reached, or a whole run was dense."""
        self._tally.check_reached()
        if sparse and self._step is not None and self._step.number == self._steps - 1:
            self._tally.check_sparse(self._steps)


@contextmanager
def sparse_denoising(
    model: nn.Module | None,
    method: StepAttention | PairChooser,
    *,
    steps: int,
    grid: TokenGrid | None = None,
    measure: bool = False,
) -> Iterator[DenoisingRun]:
    """See `gossamer.sparse_denoising`, which also takes a method by its name."""
    run = DenoisingRun(_stepwise(method), _checked_steps(steps), _checked_grid(grid), measure)
    with _opened(model, run):
        yield run
    run.check(sparse=True)


def calibrate_denoising(
    model: nn.Module | None,
    method: LearnsFromSteps,
    sample: Callable[[DenoisingRun], object],
    *,
    steps: int,
    grid: TokenGrid | None = None,
) -> Any:
    """See `gossamer.calibrate_denoising`, which also takes a method by its name."""
    _stepwise(method)
    if not isinstance(method, LearnsFromSteps):
        raise UsageError(f"{method.card.name} learns nothing from samples: use it as it is")
    watcher = _Watcher(method)
    run = DenoisingRun(watcher, _checked_steps(steps), _checked_grid(grid), False)
    with nullcontext() if model is None else evaluating(unwrap(model)), _opened(model, run):
        sample(run)
    run.check(sparse=False)
    return method.fitted(watcher.seen)


@contextmanager
def _opened(model: nn.Module | None, run: DenoisingRun) -> Iterator[None]:
    """While open, attention in the model's forwards is the run's; the model is not changed."""
    if model is None:
        yield
        return
    mode = _Interception(run)
    with mode, around_forward(unwrap(model), mode.enter, mode.leave):
        yield


class _Interception(TorchFunctionMode):
    """Hands calls of scaled_dot_product_attention inside a forward to a run."""

    def __init__(self, run: DenoisingRun) -> None:
        super().__init__()
        self._run, self._depth = run, 0

    def enter(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._run.begin_forward()

    def leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._run.end_forward()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention and self._depth:
            return self._run.intercept(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Fresh:
    """A chooser of pairs as a method of steps: it chooses anew in every call."""

    def __init__(self, method: PairChooser) -> None:
        self._method, self.card = method, method.card

    def __repr__(self) -> str:
        return repr(self._method)

    def attend(self, call: AttentionCall, step: DenoisingStep, state: Any) -> Attended:
        """The output over the chosen pairs."""
        layout = choose(call, self._method)
        output, lse = run_layout(call, layout)
        check_answered(self._method, call, lse)
        return Attended(output, pairs(layout, call))


class _Watcher:
    """Dense attention as a method, which hands every call to another one."""

    def __init__(self, method: LearnsFromSteps) -> None:
        self._method, self.card = method, method.card
        self.seen: dict[int, list[Any]] = defaultdict(list)

    def attend(self, call: AttentionCall, step: DenoisingStep, state: Any) -> Attended:
        """All pairs."""
        with torch.no_grad():
            self.seen[call.layer].append(self._method.observe_step(call, step))
        output, _ = run_layout(call, full_layout(call))
        return Attended(output, possible_pairs(call), kind="dense")


def _stepwise(method: Any) -> StepAttention:
    """The method; a chooser of pairs is made one of steps. Raises UsageError for anything else."""
    if isinstance(method, type):
        raise UsageError(f"method is the class {method.__name__}; pass an instance of it")
    if isinstance(getattr(method, "card", None), Card):
        if isinstance(method, StepAttention):
            return method
        if isinstance(method, PairChooser):
            return _Fresh(method)
    raise UsageError(
        f"{type(method).__name__} is no method of attention for diffusion models: such a method "
        "has a card and attend(call, step, state); see gossamer methods attention"
    )


def _checked_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"steps is how many a run has, a whole number from 1, not {steps!r}")
    return steps


def _checked_grid(grid: TokenGrid | None) -> TokenGrid | None:
    if grid is not None and not isinstance(grid, TokenGrid):
        raise UsageError(f"grid is a gs.TokenGrid or None, not {grid!r}")
    return grid


def _all_true(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())
