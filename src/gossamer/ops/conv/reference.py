"""The plain reference of the convolutions, and the form of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS, COUNTS = 4, 16


@dataclass(frozen=True)
class Form:
    """Kept weights of a matrix (out, depth) in the order in which the kernel meets them.

    values float32 (nnz,). Plain: columns uint16 (nnz,) and counts int32 (out,), outputs with the
    most kept weights first; rows int32 (out,) says which output each is. Tiled: tiles of 4 outputs;
    inside one, columns sorted by which of the 4 keep them, once each, with counts int32
    (tiles * 16,) of every pattern; rows is empty. Made by `build`, which is what the kernel trusts.
    """

    values: Tensor
    columns: Tensor
    counts: Tensor
    rows: Tensor
    shape: tuple[int, int]
    tiled: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in (self.values, self.columns, self.counts, self.rows))


@dataclass(frozen=True)
class Window:
    """Kernel, stride and padding of a convolution, each (vertical, horizontal)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result."""
        rows = (height + 2 * self.padding[0] - self.kernel[0]) // self.stride[0] + 1
        return rows, (width + 2 * self.padding[1] - self.kernel[1]) // self.stride[1] + 1


@dataclass(frozen=True)
class Epilogue:
    """What follows a sum: the bias of its channel, or None, then a clamp that NaN passes."""

    bias: Tensor | None
    low: float
    high: float


@dataclass(frozen=True)
class Depthwise:
    """A 3x3 depthwise convolution, padding 1: weight float32 (channels, 1, 3, 3), stride 1 or 2."""

    weight: Tensor
    stride: int
    epilogue: Epilogue


def build_rows(matrix: Tensor) -> Form:
    """The plain form."""
    kept = (matrix != 0).sum(dim=1)
    rows = torch.sort(kept, descending=True, stable=True).indices
    ordered = matrix[rows]
    columns = torch.nonzero(ordered)[:, 1]
    shape = (matrix.shape[0], matrix.shape[1])
    counts = kept[rows].to(torch.int32)
    values = ordered[ordered != 0].contiguous()
    return Form(values, columns.to(torch.uint16), counts, rows.to(torch.int32), shape, False)


def build_tiles(matrix: Tensor) -> Form:
    """The tiled form."""
    out, depth = matrix.shape
    tiles = -(-out // ROWS)
    padded = functional.pad(matrix, (0, 0, 0, tiles * ROWS - out)).reshape(tiles, ROWS, depth)
    bits = torch.tensor([1, 2, 4, 8]).reshape(ROWS, 1)
    patterns = ((padded != 0) * bits).sum(dim=1)
    order = torch.sort(patterns, dim=1, stable=True).indices
    found = patterns.gather(1, order)
    counts = torch.zeros(tiles, COUNTS, dtype=torch.int32)
    counts.scatter_add_(1, patterns, torch.ones_like(patterns, dtype=torch.int32))
    counts[:, 0] = 0
    moved = padded.gather(2, order[:, None].expand(-1, ROWS, -1)).transpose(1, 2)
    return Form(
        moved[moved != 0].contiguous(),
        order[found != 0].to(torch.uint16),
        counts.reshape(-1),
        torch.empty(0, dtype=torch.int32),
        (out, depth),
        True,
    )


def to_matrix(form: Form) -> Tensor:
    """The dense matrix (out, depth), by following the form's own definition."""
    out, depth = form.shape
    columns, counts = form.columns.long(), form.counts.long()
    if not form.tiled:
        matrix = form.values.new_zeros(out, depth)
        matrix[form.rows.long().repeat_interleave(counts), columns] = form.values
        return matrix
    matrix = form.values.new_zeros(-(-out // ROWS) * ROWS, depth)
    places = torch.arange(counts.numel()).repeat_interleave(counts)
    keeps = (places[:, None] % COUNTS >> torch.arange(ROWS)) & 1 == 1
    rows = places[:, None] // COUNTS * ROWS + torch.arange(ROWS)
    matrix[rows[keeps], columns[:, None].expand(-1, ROWS)[keeps]] = form.values
    return matrix[:out]


def conv(
    x: Tensor, form: Form, window: Window, epilogue: Epilogue, prologue: Depthwise | None
) -> Tensor:
    """x (images, channels, height, width); inputs that an output does not keep never touch it."""
    if prologue is not None:
        x = depthwise(x, prologue)
    height, width = window.outputs(x.shape[2], x.shape[3])
    images, channels = x.shape[:2]
    places = functional.unfold(x, window.kernel, 1, window.padding, window.stride)
    taps = window.kernel[0] * window.kernel[1]
    places = places.reshape(images, channels, taps, height * width).transpose(1, 2).flatten(1, 2)
    matrix = to_matrix(form)
    odd = ~torch.isfinite(places)
    y = matrix @ torch.where(odd, 0.0, places)
    for image, column, pixel in odd.nonzero().tolist():
        keeps = matrix[:, column] != 0
        y[image, keeps, pixel] += matrix[keeps, column] * places[image, column, pixel]
    y = y if epilogue.bias is None else y + epilogue.bias.reshape(-1, 1)
    return y.clamp(epilogue.low, epilogue.high).reshape(images, form.shape[0], height, width)


def depthwise(x: Tensor, convolution: Depthwise) -> Tensor:
    """torch's own, and a clamp."""
    weight, epilogue = convolution.weight, convolution.epilogue
    y = functional.conv2d(x, weight, epilogue.bias, convolution.stride, 1, groups=weight.shape[0])
    return y.clamp(epilogue.low, epilogue.high)


@dataclass(frozen=True)
class Stage:
    """One step of a chain: a depthwise convolution, a sparse one, or both in this order."""

    form: Form | None
    window: Window
    epilogue: Epilogue
    prologue: Depthwise | None

    @property
    def whole(self) -> Window:
        """The window over the stage's input."""
        if self.prologue is None:
            return self.window
        return Window((3, 3), (self.prologue.stride, self.prologue.stride), (1, 1))

    @property
    def channels(self) -> tuple[int, int]:
        """Of the input and of the result."""
        if self.prologue is not None:
            inputs = self.prologue.weight.shape[0]
            return inputs, inputs if self.form is None else self.form.shape[0]
        assert self.form is not None
        return self.form.shape[1] // (self.window.kernel[0] * self.window.kernel[1]), (
            self.form.shape[0]
        )


class Chain:
    """The plain reference of a chain of stages."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages

    def run(self, x: Tensor) -> Tensor:
        """x contiguous."""
        for stage in self.stages:
            if stage.form is not None:
                x = conv(x, stage.form, stage.window, stage.epilogue, stage.prologue)
            elif stage.prologue is not None:
                x = depthwise(x, stage.prologue)
        return x
