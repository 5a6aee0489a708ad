"""Sparse training under Lightning's Trainer.

trainer = lightning.Trainer(callbacks=[SparseTraining(gs.weights.RigL(0.1))], max_steps=1000)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.engine.checks import check_no_mask
from gossamer.engine.protocols import TopologyMethod
from gossamer.engine.train.masked import sparse_training
from gossamer.engine.train.run import SparseRun

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    raise MissingExtra("lightning", "lightning") from None


class SparseTraining(Callback):
    """Opens sparse training when fitting starts and closes it when it ends or fails.

    Schedules run over Lightning's estimate of all optimizer steps. Gradients are masked before
    Lightning clips them. The state travels in Lightning's own checkpoints. Averages that other
    callbacks keep (WeightAveraging, StochasticWeightAveraging) are held to the current support
    wherever they are used. Automatic optimization with one
    optimizer. loss, include, exclude, seed: as in `sparse_training`. run: the SparseRun,
    once fitting started.
    """

    def __init__(
        self,
        method: TopologyMethod,
        *,
        loss: Callable[[], Tensor] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_no_mask(method, "the callback for Lightning")
        self.method, self.loss, self.seed = method, loss, seed
        self.include, self.exclude = include, exclude
        self.run: SparseRun | None = None
        self._open = ExitStack()
        self._saved: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Mask the model, or continue from the checkpoint that Lightning restored."""
        with suppress(UsageError):  # of a training that failed
            self._open.close()
        if len(trainer.optimizers) != 1:
            raise UsageError(
                f"sparse training under Lightning takes one optimizer, not {len(trainer.optimizers)}"
            )
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise UsageError("the schedules need an end: give Lightning max_steps or max_epochs")
        self.run = self._open.enter_context(
            sparse_training(
                pl_module,
                trainer.optimizers[0],
                self.method,
                total_steps=int(steps),
                include=self.include,
                exclude=self.exclude,
                loss=self.loss,
                seed=self.seed,
                state=self._saved,
                group=torch.distributed.group.WORLD if trainer.world_size > 1 else None,
            )
        )
        self._saved = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Mask the gradients; Lightning clips them next."""
        assert self.run is not None
        self.run.mask_gradients()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Hold averages to the support before they are used."""
        self._hold_averages(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The same, for averages that are swapped in for validation."""
        self._hold_averages(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The same, for averages that are saved."""
        self._hold_averages(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks away; the model keeps its zeros."""
        self._hold_averages(trainer, pl_module)
        self._open.close()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Hold the support in what other callbacks left as the model, such as an average."""
        if self.run is not None:
            self._hold_averages(trainer, pl_module)
            self.run.check()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks away."""
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning stores of this callback."""
        return {} if self.run is None else self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning restores, used when fitting starts."""
        self._saved = state_dict or None

    def _hold_averages(self, trainer: Any, pl_module: Any) -> None:
        """Mask the averages that other callbacks keep, and the model, which may hold one now."""
        averages = [
            value
            for callback in trainer.callbacks
            for value in vars(callback).values()
            if isinstance(value, AveragedModel)
            or (isinstance(value, type(pl_module)) and value is not pl_module)
        ]
        if self.run is not None and averages:
            for model in (*averages, pl_module):
                self.run.apply_to(model)
