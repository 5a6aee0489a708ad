"""Suite `training`: one step of a stack of linear layers, forward and both gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.bench.measure import Limits, Repeats, interleaved
from gossamer.core.errors import GossamerError
from gossamer.ops import csr


@dataclass(frozen=True)
class Case:
    """An MLP of `layers` hidden layers, width by width, with ReLU between, in float32."""

    width: int
    layers: int
    density: float
    batch: int


def cases() -> list[Case]:
    """Width 4096, batch 128, three densities."""
    return [Case(4096, 2, density, 128) for density in (0.2, 0.1, 0.05)]


def measure(case: Case, limits: Limits, rounds: Repeats | int = 7) -> dict[str, Any]:
    """Seconds of a step against dense autograd; raises GossamerError where gradients differ.

    Both compute every gradient, that of the input too. Dense autograd runs in both of its ways:
    writing gradients anew, and adding to buffers that are zeroed in place; the faster counts.
    """
    sparse = _Sparse(case)
    dense = _dense(sparse)
    x = torch.randn(case.batch, case.width, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    _check(sparse, dense, x)
    calls: dict[str, Callable[[], object]] = {
        "gossamer": lambda: _step(sparse, x, True),
        "torch dense float32, new gradients": lambda: _step(dense, x, True),
        "torch dense float32, gradients in place": lambda: _step(dense, x, False),
    }
    turns = interleaved(calls, rounds)
    nnz = sum(layer.numel() for layer in sparse.weights)
    return turns.record(case, limits.seconds(4 * nnz * (3 + 5), 6 * nnz * case.batch))


class _Sparse(nn.Module):
    """The stack, from the operation alone."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = case.width**2
        self.indices, weights = [], []
        for _ in range(case.layers):
            drawn = torch.rand(size, generator=generator) < case.density
            self.indices.append(csr.build(drawn.nonzero().reshape(-1), (case.width, case.width)))
            values = torch.randn(self.indices[-1].columns.shape, generator=generator)
            weights.append(nn.Parameter(values * (case.density * case.width) ** -0.5))
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, width) through every layer."""
        for index, values in zip(self.indices, self.weights, strict=True):
            x = functional.relu(csr.linear(x, values, index))
        return x


def _dense(sparse: _Sparse) -> nn.Sequential:
    """The same weights in torch's layers."""
    layers: list[nn.Module] = []
    for index, values in zip(sparse.indices, sparse.weights, strict=True):
        layer = nn.Linear(index.shape[1], index.shape[0], bias=False)
        with torch.no_grad():
            layer.weight.zero_().view(-1)[index.positions] = values
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def _step(model: nn.Module, x: Tensor, anew: bool) -> None:
    x.grad = None
    model.zero_grad(set_to_none=anew)
    model(x).sum().backward()


def _check(sparse: _Sparse, dense: nn.Module, x: Tensor) -> None:
    """No speed for wrong gradients. A unit within rounding of zero may pass ReLU in one only, which
    moves the norms by a thousandth."""
    found = []
    for model in (sparse, dense):
        _step(model, x, True)
        assert x.grad is not None
        found.append([x.grad, *(p.grad for p in model.parameters())])
    for place, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert ours is not None and theirs is not None
        if place:
            theirs = theirs.view(-1)[sparse.indices[place - 1].positions]
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < 1e-2:
            raise GossamerError(f"a gradient is wrong: relative error {error:.1e}")
