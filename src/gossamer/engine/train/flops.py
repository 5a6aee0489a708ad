"""What a training step costs, counted from the layers' densities at that step.

A layer's forward multiply-adds are its weights times the places where each is used. A step costs
them three times: forward, gradient of the input, gradient of the weight. Each shrinks with the
layer's density, except the gradient of the weight in steps that need it dense. Attention scores,
norms, the loss and the optimizer are left out, for every method alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.engine.flops import forward_flops
from gossamer.engine.protocols import GradientSource, TopologyMethod
from gossamer.engine.train.estimate import EstimatedGradients
from gossamer.engine.train.run import SparseRun


class Meter:
    """FLOPs spent and topology changed by one run, followed step by step."""

    def __init__(self, work: dict[int, float], run: SparseRun | None) -> None:
        self.run, self.spent, self.updates, self.flips, self.start_density = run, 0.0, 0, 0, 1.0
        self.dense_step = 6 * sum(work.values())
        """FLOPs of a dense step."""
        self._masks: dict[str, Tensor] | None = None
        self._first: dict[str, Tensor] = {}
        self._rest = sum(work.values())
        self._work: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        if run is not None:
            self._work = {x.name: work.get(id(x.weight), 0.0) for x in run.layers}
            self._rest -= sum(self._work.values())
            self._first = {name: mask.clone() for name, mask in run.masks.items()}
            self.start_density = run.density
            self._look()

    def before_step(self, forwards: int | None = None) -> None:
        """Add the step that is about to be taken; forwards: its passes where it has no backward."""
        if forwards is not None:
            self.spent += self.dense_step / 3 * forwards
            return
        forward = backward = self._rest
        if self.run is not None:
            method, step = self.run.method, self.run.step + 1
            whole = method.keeps_dense_weights or (
                "gradients" in method.card.needs and method.due(step, self.run.total_steps)
            )
            for name, work in self._work.items():
                forward += work * self._shares[name]
                backward += work if whole else work * self._shares[name]
        self.spent += 2 * (2 * forward + backward)

    def after_step(self) -> None:
        """Note whether the support changed."""
        if self.run is not None and self.run.masks is not self._masks:
            self.updates += 1
            self.flips += self.run.changed
            self._look()

    @property
    def weights(self) -> int:
        """Mask entries of the run."""
        return sum(mask.numel() for mask in self._first.values())

    @property
    def sad_per_update(self) -> float:
        """Mean share of mask entries that an update flips."""
        return self.flips / max(1, self.updates * self.weights)

    @property
    def sad_start_to_end(self) -> float:
        """Share of mask entries that differ between the first support and the present one."""
        if self.run is None:
            return 0.0
        changed = (int((self._first[n] ^ mask).sum()) for n, mask in self.run.masks.items())
        return sum(changed) / max(1, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """What continues the count."""
        first = {name: mask.clone() for name, mask in self._first.items()}
        return {"spent": self.spent, "updates": self.updates, "flips": self.flips, "first": first,
                "start_density": self.start_density}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.spent, self.updates, self.flips = state["spent"], state["updates"], state["flips"]
        self._first, self.start_density = dict(state["first"]), state["start_density"]

    def _look(self) -> None:
        assert self.run is not None
        self._masks = self.run.masks
        self._shares = {name: float(m.double().mean()) for name, m in self._masks.items()}


def expected_flops(
    model: nn.Module,
    method: TopologyMethod | None,
    total: int,
    forward: Callable[[nn.Module], Tensor],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> float:
    """What a run of `total` steps would cost, from its schedule played on a copy without training.

    Weights stay as they are and gradients are random, so where a method moves density between
    layers by what it learns, the real cost differs a little.
    """
    model = copy.deepcopy(model)
    work = forward_flops(model, lambda: forward(model))
    if method is None:
        return Meter(work, None).dense_step * total
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    run = SparseRun(model, optimizer, method, total, include, exclude)
    run.start(lambda: forward(model))
    meter = Meter(work, run)
    generator = torch.Generator().manual_seed(0)
    for step in range(total):
        run.step = step
        meter.before_step()
        if method.keeps_dense_weights or not method.due(step + 1, total):
            continue
        for layer in run.layers:
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.grad = noise.to(layer.weight)
        run.mask_gradients()
        run.after_step()
        meter.after_step()
    return meter.spent


def expected_query_flops(
    model: nn.Module, source: GradientSource, total: int, forward: Callable[[nn.Module], Tensor]
) -> float:
    """What a run of `total` steps costs whose gradients are estimated: forward passes alone."""
    model = copy.deepcopy(model)
    meter = Meter(forward_flops(model, lambda: forward(model)), None)
    estimates = EstimatedGradients(model, source, total)
    estimates.choose()
    meter.before_step(estimates.queries)
    return meter.spent * total


def steps_for(budget: float, first: int, cost: Callable[[int], float]) -> int:
    """The number of steps whose cost is nearest to the budget, from a first guess.

    cost(steps) is nearly proportional to steps; updates at whole steps make it not quite so.
    """
    best, steps = first, first
    for _ in range(6):
        spent = cost(steps)
        if abs(spent - budget) <= abs(cost(best) - budget):
            best = steps
        steps = max(1, round(steps * budget / spent))
        if steps == best:
            break
    return best
