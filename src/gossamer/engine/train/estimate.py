"""Gradients from values of the loss alone, where a training loop would call `loss.backward()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.result import unwrap
from gossamer.engine.protocols import GradientSource
from gossamer.engine.train.checkpoint import random_state, set_random_state

_SAME = 1e-5
"""Relative difference between two losses of the same weights and data that counts as none."""


class EstimatedGradients:
    """Gradients of a model's parameters from values of its loss, by a gradient source.

    In a loop, `backward(loss)` takes the place of `loss.backward()`. Every query sees the same
    random numbers and buffers, so that dropout and batch norms behave as in one forward pass.
    Afterwards both are as after one forward pass.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require gradients get them. They are float32 or float64.
    source : GradientSource
        Such as `gs.weights.DeepZero()`.
    total_steps : int
        Steps of the whole run.
    seed : int
        Of what the source draws.

    Raises
    ------
    UsageError
        For another method, a model in half precision, where differences of losses drown in
        rounding, or several processes, whose estimates would differ.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model, x = torch.nn.Linear(8, 1), torch.randn(16, 8)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> estimates = gs.EstimatedGradients(model, gs.weights.DeepZero(active=0.5), total_steps=9)
    >>> for _ in range(9):
    ...     optimizer.zero_grad()
    ...     loss = estimates.backward(lambda: model(x).square().mean())
    ...     optimizer.step()
    >>> estimates.queries  # the loss as it is, four weights and the bias
    6
    """

    def __init__(
        self, model: nn.Module, source: GradientSource, total_steps: int, seed: int = 0
    ) -> None:
        if isinstance(source, type) or not isinstance(source, GradientSource):
            raise UsageError(f"{source!r} is not an instance of a gradient source")
        if total_steps < 1:
            raise UsageError("total_steps is at least 1")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise UsageError("gradients are estimated in one process, not on several ranks")
        self.model, self.source, self.total = unwrap(model), source, total_steps
        self.number = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.coordinates: dict[str, Tensor] = {}
        if not self.parameters:
            raise UsageError(f"{type(self.model).__name__} has no parameter to train")
        for name, p in self.parameters.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise UsageError(
                    f"{name} is {p.dtype}, in which differences of losses drown in rounding; train "
                    "in float32"
                )

    @property
    def queries(self) -> int:
        """How many times a step asks for the loss, under the present choice of coordinates."""
        return self.source.queries(self.coordinates)

    @torch.no_grad()
    def backward(self, loss: Callable[[], Tensor]) -> float:
        """Add the estimate to the gradients, and return the loss of the weights as they are.

        Parameters
        ----------
        loss : callable
            Gives the loss, a scalar, of the same batch at every call.

        Raises
        ------
        UsageError
            Before the first step, where two calls give different losses: then it draws a batch or
            noise that is not torch's.
        NonFiniteError
            Where an estimate is NaN or infinite; no gradient is set then.
        """
        self.choose()
        held = {name: p.detach() for name, p in self.parameters.items()}
        ask = _Queries(self.model, loss)
        try:
            if not self.number:
                _check_repeats(ask)
            found = self.source.estimate(ask, held, self.coordinates, self.generator)
            for name, gradient in found.items():
                if not bool(torch.isfinite(gradient).all()):
                    raise NonFiniteError(
                        f"{name}: the estimate of its gradient in step {self.number + 1} is not a "
                        "number; lower the learning rate or the step of the estimate"
                    )
        except BaseException:
            ask.undo()
            raise
        value = ask.finish()
        for name, p in self.parameters.items():
            p.grad = found[name] if p.grad is None else p.grad + found[name]
        self.number += 1
        return value

    def choose(self) -> None:
        """Choose the coordinates of the step that comes, where a new choice is due."""
        if not self.coordinates or self.source.due(self.number, self.total):
            self.coordinates = self.source.coordinates(self.parameters, self.generator)

    def state_dict(self) -> dict[str, Any]:
        """What the estimates need to continue bit for bit, beside model and optimizer."""
        return {"number": self.number, "generator": self.generator.get_state(),
                "coordinates": dict(self.coordinates)}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.number = state["number"]
        self.generator.set_state(state["generator"])
        self.coordinates = {
            name: state["coordinates"][name].to(p.device)
            for name, p in self.parameters.items()
            if name in state["coordinates"]
        }


class _Queries:
    """Calls a loss again and again from the same random numbers and buffers."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self._loss, self._buffers = loss, list(_buffers(model))
        self._random = random_state()
        self._before = [buffer.clone() for buffer in self._buffers]
        self._after: tuple[dict[str, Tensor], list[Tensor]] | None = None
        self._value = 0.0

    def __call__(self) -> float:
        """The loss of the parameters as they are now; the first call's is that of the step."""
        if self._after is not None:
            self._restore(self._random, self._before)
        value = float(self._loss())
        if self._after is None:
            self._after = random_state(), [buffer.clone() for buffer in self._buffers]
            self._value = value
        return value

    def finish(self) -> float:
        """Leave random numbers and buffers as after one call, and return that call's loss."""
        if self._after is None:
            raise UsageError("a gradient source asks for the loss at least once")
        self._restore(*self._after)
        return self._value

    def undo(self) -> None:
        """Leave random numbers and buffers as they were before the first call."""
        self._restore(self._random, self._before)

    def _restore(self, random: dict[str, Tensor], buffers: list[Tensor]) -> None:
        set_random_state(random)
        for buffer, value in zip(self._buffers, buffers, strict=True):
            buffer.copy_(value)


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    """Every buffer once."""
    yield from {id(buffer): buffer for buffer in model.buffers()}.values()


def _check_repeats(ask: _Queries) -> None:
    first, second = ask(), ask()
    if abs(first - second) > _SAME * max(abs(first), 1e-30):
        raise UsageError(
            f"the loss of one batch is {first:g} and then {second:g}, with the same weights: give "
            "the same batch at every call, and draw noise by torch's own generator alone"
        )
