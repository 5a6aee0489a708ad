"""Sparse training under `transformers.Trainer`.

trainer = Trainer(model, args, train_dataset=data, callbacks=[SparseTraining(gs.weights.RigL(0.1))])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.engine.checks import check_no_mask
from gossamer.engine.protocols import TopologyMethod
from gossamer.engine.train.checkpoint import read_state, write_state
from gossamer.engine.train.masked import sparse_training
from gossamer.engine.train.run import SparseRun

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtra("transformers", "hf") from None

FILE = "sparse_training.safetensors"
"""What is written into each of the Trainer's checkpoints."""


class SparseTraining(TrainerCallback):
    """Opens sparse training when the Trainer begins and closes it when it ends.

    Schedules run over the Trainer's `max_steps`. The Trainer clips gradients before any callback is
    asked; here `max_grad_norm` is applied after masking instead, to the norm of the kept weights
    (the grad_norm that the Trainer logs remains the one before masking). Each checkpoint gets a
    file of ours; `resume_from_checkpoint` finds it in `output_dir`, or in the folder `checkpoint`.

    loss, include, exclude, seed: as in `sparse_training`. run: the SparseRun, once training began.
    """

    def __init__(
        self,
        method: TopologyMethod,
        *,
        loss: Callable[[], Tensor] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> None:
        check_no_mask(method, "the callback for the Trainer")
        self.method, self.loss, self.seed, self.checkpoint = method, loss, seed, checkpoint
        self.include, self.exclude = include, exclude
        self.run: SparseRun | None = None
        self._open = ExitStack()
        self._clip: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mask the model, or continue from the checkpoint that the Trainer resumes from."""
        with suppress(UsageError):  # of a training that failed
            self._open.close()
        self._release(args)
        model: nn.Module = kwargs["model"]
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.run = self._open.enter_context(
            sparse_training(
                model,
                kwargs["optimizer"],
                self.method,
                total_steps=state.max_steps,
                include=self.include,
                exclude=self.exclude,
                loss=self.loss,
                seed=self.seed,
                state=self._saved(args, state.global_step),
                group=torch.distributed.group.WORLD if together else None,
            )
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the Trainer from clipping gradients that are still to be masked."""
        self._clip, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mask the gradients, then clip what is left."""
        assert self.run is not None
        self._release(args)
        self.run.mask_gradients()
        if args.max_grad_norm and args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(kwargs["model"].parameters(), args.max_grad_norm)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the density and the share of weights ever kept to what is logged."""
        logs = kwargs.get("logs")
        if self.run is not None and logs is not None and "loss" in logs:
            for place in (logs, state.log_history[-1]):
                place.update(density=self.run.density, itop_rate=self.run.itop_rate)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the sparse state beside the Trainer's own."""
        if self.run is not None and state.is_world_process_zero:
            write_state(_folder(args, state.global_step) / FILE, self.run.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks away; the model keeps its zeros, of the best checkpoint if that was
        loaded."""
        best = state.best_model_checkpoint
        if self.run is not None and args.load_best_model_at_end and best is not None:
            self.run.load_state_dict(self._read(Path(best)))
        self._release(args)
        self._open.close()

    def _release(self, args: Any) -> None:
        if self._clip is not None:
            args.max_grad_norm, self._clip = self._clip, None

    def _saved(self, args: Any, step: int) -> Mapping[str, Any] | None:
        if step == 0:
            return None
        return self._read(Path(self.checkpoint) if self.checkpoint else _folder(args, step))

    def _read(self, folder: Path) -> Mapping[str, Any]:
        if not (folder / FILE).is_file():
            raise UsageError(
                f"{folder} holds no {FILE}; pass SparseTraining(checkpoint=...), the folder that "
                "the Trainer resumes from"
            )
        return read_state(folder / FILE)


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"
