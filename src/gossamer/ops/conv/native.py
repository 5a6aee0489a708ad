"""The compiled backend of the convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops._dispatch import compiled, isa_index
from gossamer.ops.conv.reference import Depthwise, Epilogue, Form, Stage, Window


def conv(
    x: Tensor, form: Form, window: Window, epilogue: Epilogue, prologue: Depthwise | None
) -> Tensor:
    """x, biases and the prologue's weight contiguous."""
    return Chain([Stage(form, window, epilogue, prologue)]).run(x)


def depthwise(x: Tensor, convolution: Depthwise) -> Tensor:
    """x, weight and bias contiguous."""
    return Chain([Stage(None, Window(), convolution.epilogue, convolution)]).run(x)


class Chain:
    """Stages in one compiled call; the compiled chain holds their tensors and what lies between."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self._chain = compiled().ConvChain([_stage(stage) for stage in stages])

    def run(self, x: Tensor) -> Tensor:
        """x contiguous."""
        try:
            shape = self._chain.shape(x)
        except ValueError as error:
            raise UsageError(str(error)) from None
        y = torch.empty(shape)
        self._chain.run(x, y, torch.get_num_threads(), isa_index())
        return y


def _stage(stage: Stage) -> Any:
    module, form, window, first = compiled(), stage.form, stage.window, stage.prologue
    weights = depthwise = None
    if form is not None:
        parts = (form.values, form.columns, form.counts, form.rows)
        weights = module.ConvWeights(*parts, *form.shape, form.tiled)
    if first is not None:
        depthwise = module.DepthwiseConv(first.weight, first.stride, _epilogue(first.epilogue))
    sizes = (window.kernel, window.stride, window.padding)
    return module.ConvStage(weights, *sizes, _epilogue(stage.epilogue), depthwise)


def _epilogue(epilogue: Epilogue) -> Any:
    return compiled().ConvEpilogue(epilogue.bias, epilogue.low, epilogue.high)
