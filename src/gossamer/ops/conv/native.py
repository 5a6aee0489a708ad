"""The compiled home of the convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops._dispatch import isa_index, kernels
from gossamer.ops.conv.reference import Before, Ends, Form, Stage, Window

_SMALL = 1 << 16
"""Below so many multiplications a second thread costs more than it gains."""
_HELD = 8
"""So many shapes of input are remembered with their addresses."""


def conv(x: Tensor, form: Form, window: Window, ends: Ends, before: Before | None) -> Tensor:
    """x, biases and the weight before contiguous."""
    return Chain([Stage(form, window, ends, before)]).run(x)


def depthwise(x: Tensor, before: Before) -> Tensor:
    """x, weight and bias contiguous."""
    return Chain([Stage(None, Window(), before.ends, before)]).run(x)


class Chain:
    """Stages whose addresses are looked up once per shape of input; holds their tensors.

    Results between stages live in two buffers, which stay with the chain: new memory for every
    result would cost more than the small layers do. Concurrent runs take buffers of their own.
    """

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._buffers: list[Tensor] = []

    def run(self, x: Tensor) -> Tensor:
        """x contiguous."""
        shape = tuple(x.shape)
        plan = self._plans.get(shape)
        if plan is None:
            if len(self._plans) >= _HELD:
                self._plans.clear()
            self._plans[shape] = plan = _plan(self.stages, shape)
        y = torch.empty(plan.shape)
        if y.numel() == 0:
            return y
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = torch.empty(0)
        if buffer.numel() < sum(plan.sizes):
            buffer = torch.empty(sum(plan.sizes))
        middle = (buffer.data_ptr(), buffer.data_ptr() + 4 * plan.sizes[0])
        source, isa, threads = x.data_ptr(), isa_index(), torch.get_num_threads()
        for index, (call, arguments, small) in enumerate(plan.calls, 1):
            target = y.data_ptr() if index == len(plan.calls) else middle[index % 2]
            call(*arguments, source, target, 1 if small else threads, isa)
            source = target
        self._buffers.append(buffer)
        return y


@dataclass(frozen=True)
class _Plan:
    """Calls without the addresses of images; the floats of both buffers; the result's shape."""

    calls: list[tuple[Any, tuple[Any, ...], bool]]
    sizes: tuple[int, int]
    shape: tuple[int, ...]


def _plan(stages: list[Stage], shape: tuple[int, ...]) -> _Plan:
    module: Any = kernels()
    assert module is not None
    calls, sizes = [], [0, 0]
    for index, stage in enumerate(stages, 1):
        window, (inputs, out) = stage.whole, stage.channels
        high, wide = window.outputs(shape[2], shape[3])
        if inputs != shape[1] or min(high, wide) < 1:
            raise UsageError(f"images {shape} do not fit a convolution of {inputs} channels")
        geometry = (*shape, *window.kernel, *window.stride, *window.padding)
        shape = (shape[0], out, high, wide)
        pixels = shape[0] * high * wide
        if index < len(stages):
            sizes[index % 2] = max(sizes[index % 2], -(-pixels * out // 16) * 16)
        calls.append(_call(module, stage, geometry, pixels))
    return _Plan(calls, (sizes[0], sizes[1]), shape)


def _call(
    module: Any, stage: Stage, geometry: tuple[int, ...], pixels: int
) -> tuple[Any, tuple[Any, ...], bool]:
    form, ends, before = stage.form, stage.ends, stage.before
    if form is None:
        assert before is not None
        ends = before.ends
        first = (_address(before.weight), _address(ends.bias), ends.low, ends.high)
        small = 9 * pixels * before.weight.shape[0] < _SMALL
        return module.depthwise_conv, (geometry, *first), small
    parts = (form.values, form.columns, form.counts, form.rows)
    addresses = (0, 0) if before is None else (_address(before.weight), _address(before.ends.bias))
    clamp = (0.0, 0.0) if before is None else (before.ends.low, before.ends.high)
    arguments = (
        geometry,
        (*(part.data_ptr() for part in parts), *form.shape, int(form.tiled)),
        (*addresses, _address(ends.bias)),
        (*clamp, ends.low, ends.high),
    )
    return module.sparse_conv, arguments, form.values.numel() * pixels < _SMALL


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
