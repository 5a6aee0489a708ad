"""The product of a linear layer with some of its inputs, from one copy of the weight.

The weight lies as columns (in, out), so that an input that is not kept is not read. How a call runs
depends on its tokens, and is counted:

- one token: the kernel reads the kept columns;
- up to `FEW` tokens: the kernel too, each token reading its own columns, as long as that is less
  than reading the weight once; else a dense product of the masked inputs;
- more: the dense product of the same columns, of all inputs unless the layer masks prompts too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.core.activations import InputState
from gossamer.core.budget import Budget, Fraction, Threshold
from gossamer.core.density import kept_count
from gossamer.ops import _dispatch
from gossamer.ops.active import Neurons, native, reference
from gossamer.ops.select import keep

FEW = 8
"""Tokens up to which a call counts as decoding."""
ONE, ROWS, MASKED, DENSE = "one token", "few tokens", "masked dense", "dense"
"""Ways in which a call runs."""


@dataclass
class Counts:
    """What one layer did: calls by way; of calls that masked, tokens, kept inputs and unions."""

    ways: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    kept: int = 0
    calls: int = 0
    union: int = 0
    dense_tokens: int = 0

    def masked(self, way: str, tokens: int, kept: int, union: int) -> None:
        """A call whose inputs were masked."""
        self.ways[way] = self.ways.get(way, 0) + 1
        self.tokens, self.kept = self.tokens + tokens, self.kept + kept
        self.calls, self.union = self.calls + 1, self.union + union

    def dense(self, tokens: int) -> None:
        """A call of all inputs."""
        self.ways[DENSE] = self.ways.get(DENSE, 0) + 1
        self.dense_tokens += tokens


class Rotation:
    """x times an orthogonal matrix (in, in), once for all layers that are called with the same x."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._last: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        """x V, of x's dtype."""
        if self._last is not None and self._last[0]() is x and self._last[1] == x._version:
            found: Tensor = self._last[2]
            return found
        turned = x @ self.matrix.to(x.dtype)
        version = 0 if x.is_inference() else x._version
        self._last = None if x.is_inference() else (weakref.ref(x), version, turned)
        return turned


@dataclass(eq=False)
class ActiveProduct:
    """y = W (x kept) + bias, and the low-rank part where the state has one.

    columns: the weight as `ops.active` has it, (in, out); or an ordinary weight (out, in) of any
    dtype and device, whose masks are multiplied, which saves no time. budget: `Threshold` or
    `Fraction` of the scores. prompts: whether calls of more than `FEW` tokens are masked as well.
    paused: whether every call keeps every input, as the dense layer does.
    """

    columns: Neurons | Tensor
    state: InputState
    budget: Budget
    bias: Tensor | None = None
    rotation: Rotation | None = None
    prompts: bool = False
    paused: bool = False
    counts: Counts = field(default_factory=Counts)

    @property
    def skips(self) -> bool:
        """Whether a kernel may leave out what is not kept."""
        return isinstance(self.columns, Neurons)

    @property
    def width(self) -> int:
        """The number of inputs."""
        if isinstance(self.columns, Neurons):
            return self.columns.values.shape[0]
        return self.columns.shape[1]

    @property
    def out_features(self) -> int:
        """The number of outputs."""
        if isinstance(self.columns, Neurons):
            return self.columns.values.shape[1]
        return self.columns.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), of x's dtype."""
        x = x if self.rotation is None else self.rotation(x)
        width = self.width
        tokens = x.numel() // max(1, width)
        if self.paused or (tokens > FEW and not self.prompts):
            self.counts.dense(tokens)
            return self.dense(x)
        if tokens == 1 and self._kernel(x):
            return self._one(x)
        scores = self.state.score(x)
        mask = keep(scores, self.budget)
        rows = mask.reshape(-1, width)
        kept, union = int(rows.sum()), int(rows.any(dim=0).sum())
        if 1 < tokens <= FEW and kept < width and self._kernel(x):
            self.counts.masked(ROWS, tokens, kept, union)
            return self._few(x, rows)
        self.counts.masked(MASKED, tokens, kept, union)
        inputs = x.masked_fill(~mask, 0)
        return self._with_rest(x, inputs, self.dense(inputs))

    def mask(self, x: Tensor) -> Tensor:
        """bool (..., in): the inputs that each token keeps."""
        x = x if self.rotation is None else self.rotation(x)
        return keep(self.state.score(x), self.budget)

    def dense(self, x: Tensor) -> Tensor:
        """x times the whole weight, plus bias."""
        if not isinstance(self.columns, Neurons):
            return functional.linear(x, self.columns, self.bias)
        values, scale = self.columns.values, self.columns.scale
        if scale is None:
            bias = None if self.bias is None else self.bias.to(values.dtype)
            return functional.linear(x.to(values.dtype), values.t(), bias).to(x.dtype)
        if scale.shape[1] == 1:
            y = (x * scale.t().to(x.dtype)) @ values.to(x.dtype)
        else:
            y = (x @ values.to(x.dtype)) * scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _kernel(self, x: Tensor) -> bool:
        """Whether the kernel may serve: it has no gradient."""
        wanted = torch.is_grad_enabled() and x.requires_grad
        return self.skips and x.is_cpu and not wanted and x.dtype in (torch.float32, torch.bfloat16)

    def _one(self, x: Tensor) -> Tensor:
        row = x.detach().reshape(-1)
        index = self._chosen(row)
        self.counts.masked(ONE, 1, len(index), len(index))
        y = self._sum(row, index).reshape(*x.shape[:-1], -1)
        return y if self.state.bypass is None else self._with_rest(x, _only(x, index), y)

    def _few(self, x: Tensor, rows: Tensor) -> Tensor:
        flat = x.detach().reshape(len(rows), -1)
        every = [
            self._sum(row, mask.nonzero().reshape(-1).to(torch.int32))
            for row, mask in zip(flat, rows, strict=True)
        ]
        y = torch.stack(every).reshape(*x.shape[:-1], -1)
        return self._with_rest(x, x.masked_fill(~rows.reshape(x.shape), 0), y)

    def _sum(self, row: Tensor, index: Tensor) -> Tensor:
        assert isinstance(self.columns, Neurons)
        backend = _dispatch.backend(reference, native)
        parts = (self.columns.values, self.columns.scale, self.bias, index, 0.0)
        found: Tensor = backend.linear(row, *parts)
        return found

    def _chosen(self, row: Tensor) -> Tensor:
        """int32 indices, ascending, of what one token keeps."""
        backend = _dispatch.backend(reference, native)
        scores = row if self.state.scale is None else self.state.score(row)
        if isinstance(self.budget, Threshold):
            found: Tensor = backend.above(scores, self.budget.value)
            return found
        assert isinstance(self.budget, Fraction)
        top: Tensor = backend.largest(scores, kept_count(len(row), self.budget.fraction))
        return top

    def _with_rest(self, x: Tensor, kept: Tensor, y: Tensor) -> Tensor:
        """y and the low-rank part of what x has beyond `kept`."""
        if self.state.bypass is None:
            return y
        down, up = (part.to(x.dtype) for part in self.state.bypass)
        return y + functional.linear(functional.linear(x - kept, down), up)


def _only(x: Tensor, index: Tensor) -> Tensor:
    """x with zeros where it is not kept."""
    kept = torch.zeros_like(x)
    flat, places = kept.reshape(-1), index.long()
    flat[places] = x.reshape(-1)[places]
    return kept
