"""One training run, sparse or dense, that can be killed at any step and continued bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import FormatError, NonFiniteError, UsageError
from gossamer.engine.checks import check_no_mask
from gossamer.engine.data import check_same_run, digest_model
from gossamer.engine.flops import forward_flops
from gossamer.engine.protocols import GradientSource, TopologyMethod
from gossamer.engine.train.checkpoint import random_state, read_state, set_random_state, write_state
from gossamer.engine.train.estimate import EstimatedGradients
from gossamer.engine.train.flops import Meter
from gossamer.engine.train.masked import sparse_training
from gossamer.engine.train.run import SparseRun

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train, apart from sparsity."""

    steps: int
    lr: float
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"optimizer is {' or '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule is one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.steps < 1 or self.warmup < 0:
            raise UsageError("steps is at least 1 and warmup at least 0")
        if not self.lr > 0 or self.weight_decay < 0 or self.clip < 0:
            raise UsageError("lr is above 0, weight decay and clip are at least 0")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer; weight decay acts on matrices and kernels only."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.lr)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        progress = step / self.steps
        if self.schedule == "cosine":
            return self.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * warm * (1 - progress if self.schedule == "linear" else 1.0)


class Fit:
    """A model in training. `loss(model, step)` is the loss of the batch of that step, from 0.

    first, last: the steps of the recipe to begin with and to stop before; all of them if left out.
    source: estimates gradients in place of a backward pass, and goes with no method.
    """

    def __init__(
        self,
        model: nn.Module,
        method: TopologyMethod | None,
        loss: Callable[[nn.Module, int], Tensor],
        recipe: TrainingOptions,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        first: int = 0,
        last: int | None = None,
        source: GradientSource | None = None,
    ) -> None:
        check_no_mask(method, "Fit")
        if source is not None and method is not None:
            raise UsageError(
                f"{source.card.name} estimates the gradients of dense weights, most of them as "
                "zero, so no method can choose supports by them; leave one of them out"
            )
        if source is not None and (include or exclude):
            raise UsageError(
                f"{source.card.name} makes no layer sparse; leave include and exclude out"
            )
        self.model, self.method, self.loss, self.recipe = model, method, loss, recipe
        self.include, self.exclude, self.seed = include, exclude, seed
        self.optimizer = recipe.build(model)
        self.step, self.last = first, recipe.steps if last is None else last
        self.losses: list[float] = []
        self.run: SparseRun | None = None
        self.estimates = None
        if source is not None:
            self.estimates = EstimatedGradients(model, source, recipe.steps, seed)
        self._model = digest_model(model)
        self.work = forward_flops(model, lambda: loss(model, 0))
        self.meter = Meter(self.work, None)

    @property
    def density(self) -> float:
        """Kept weights of the layers in the run; 1 without a method."""
        return 1.0 if self.run is None else self.run.density

    def train(
        self,
        checkpoint: Path | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        save_every: int = 50,
        report: Callable[[Fit], None] = lambda fit: None,
    ) -> None:
        """Train to the end, from `checkpoint` if that exists; written every `save_every` steps.

        report: called after each step. Raises UsageError where the checkpoint is of another run
        (another fingerprint, initial model or torch), NonFiniteError for a loss that is not a
        number, the last checkpoint unharmed.
        """
        facts = {**(fingerprint or {}), "initial weights": self._model, "torch": torch.__version__}
        name = json.dumps(facts, sort_keys=True, default=str)
        state = self._read(checkpoint, name)
        with self._opened(state):
            while self.step < self.last:
                self._advance()
                report(self)
                ends = self.step == self.last
                if checkpoint is not None and (self.step % save_every == 0 or ends):
                    write_state(checkpoint, self._state(name))

    @contextmanager
    def _opened(self, state: dict[str, Any] | None) -> Iterator[None]:
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.losses = state["step"], state["losses"]
        if self.method is None:
            self._restore(state)
            yield
            return
        with sparse_training(
            self.model,
            self.optimizer,
            self.method,
            total_steps=self.recipe.steps,
            include=self.include,
            exclude=self.exclude,
            loss=lambda: self.loss(self.model, 0),
            seed=self.seed,
            state=None if state is None else state["run"],
        ) as self.run:
            self.meter = Meter(self.work, self.run)
            self._restore(state)
            yield

    def _restore(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.meter.load_state_dict(state["meter"])
            if self.estimates is not None:
                self.estimates.load_state_dict(state["estimates"])
            set_random_state(state["random"])

    def _advance(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.model.train()
        self.optimizer.zero_grad()
        value = self._backward()
        if self.recipe.clip:
            if self.run is not None:
                self.run.mask_gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.meter.before_step(None if self.estimates is None else self.estimates.queries)
        self.optimizer.step()
        self.meter.after_step()
        self.step += 1
        self.losses.append(value)

    def _backward(self) -> float:
        """Set the gradients of this step, and return its loss."""
        if self.estimates is not None:
            return self.estimates.backward(lambda: self.loss(self.model, self.step))
        loss = self.loss(self.model, self.step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss is {value} in step {self.step + 1}; lower lr or set clip; the last "
                "checkpoint is unharmed"
            )
        loss.backward()
        return value

    def _state(self, fingerprint: str) -> dict[str, Any]:
        return {
            "fingerprint": fingerprint,
            "step": self.step,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "run": None if self.run is None else self.run.state_dict(),
            "estimates": None if self.estimates is None else self.estimates.state_dict(),
            "meter": self.meter.state_dict(),
            "random": random_state(),
        }

    def _read(self, checkpoint: Path | None, fingerprint: str) -> dict[str, Any] | None:
        if checkpoint is None or not checkpoint.exists():
            return None
        state = read_state(checkpoint)
        try:
            old = dict(json.loads(state["fingerprint"]))
        except (KeyError, TypeError, ValueError):
            raise FormatError(f"{checkpoint}: damaged; delete it and start again") from None
        remedy = "repeat that run, delete the file, or choose another place"
        check_same_run(str(checkpoint), old, json.loads(fingerprint), remedy)
        return state
