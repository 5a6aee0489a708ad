"""Sparse training: one loop for every method that chooses weights while the model trains.

Masks are data beside the model, not parametrizations: the parameter itself holds the masked
weights between steps. So every forward (eager, compiled, under autocast, in another library's
code) sees exact zeros without a wrapped module or a renamed parameter, checkpoints keep their
names, and `weight.grad` already is the dense gradient that growth needs, at no extra pass.
What must happen around a step hangs on the optimizer's own step hooks rather than on a call that
each loop must remember: gradient accumulation, a GradScaler that skips a step and other trainers
then do the right thing unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.allocation import LayerInfo
from gossamer.core.errors import UsageError
from gossamer.core.pattern import check_pattern, format_pattern
from gossamer.core.support import Support
from gossamer.engine.hooks import around_ascents, around_steps, around_wrappers
from gossamer.engine.protocols import Trainer
from gossamer.engine.train.distributed import unwrapped
from gossamer.engine.train.guard import Guard, check_state, check_total, mask_copy
from gossamer.engine.train.layers import (
    TrainedLayer,
    check_held,
    check_kept,
    frozen_layers,
    left_dense,
    start_gradients,
    trained_layers,
    warn_dense,
    whole_gradients,
)
from gossamer.engine.train.optimizers import follow

VERSION = 1


@contextmanager
def sparse_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer: Trainer,
    *,
    total_steps: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    loss: Callable[[], Tensor] | None = None,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    group: Any = None,
) -> Iterator[SparseRun]:
    """Train inside, with `optimizer.step()` as usual; the weights follow the trainer's support.

    total_steps: optimizer steps of the whole run, for the schedules. include, exclude: as in
    `prune`; layers that are frozen are left alone. loss: computes the loss of one batch, for a
    method that looks at gradients before training (SNIP). state: an earlier `state_dict()`, to
    continue from. group: the process group that trains the model together, where neither DDP nor
    FSDP2 says so. After the block the model holds its sparse weights and nothing else of ours.

    optimizer: a torch optimizer, or what wraps one: accelerate's, Lookahead, SAM with `first_step`
    and `second_step`, whose both gradients are then those of the sparse network. The steps of the
    inner optimizer count. To clip gradients, call `sparsity.mask_gradients()` first (under a
    GradScaler, after `unscale_`), so that the norm is that of the kept weights. Optimizer state is
    reset where it is shaped as the weight (SGD, Adam and kin; not Adafactor's factored moments).

    An average of the weights (EMA, `torch.optim.swa_utils.AveragedModel`) over supports that move
    is denser than the model: call `sparsity.apply_to(averaged)` before it is used.

    Raises UsageError for a density that empties a layer, a pattern that does not divide, a weight
    that is recomputed at every forward, an optimizer that holds other parameters than the model's,
    a missing gradient, and for weights that changed outside the support or with no step seen;
    NonFiniteError before a step with NaN or infinite gradients; before steps on all ranks or none.
    """
    run = SparseRun(model, optimizer, trainer, total_steps, include, exclude, seed, group)
    with (
        around_steps(run.optimizer, run.before_step, run.after_step),
        around_ascents(run.followed, run.before_ascent, run.after_ascent),
        around_wrappers(run.followed, run.before_wrapper, run.after_wrapper),
    ):
        if state is None:
            run.start(loss)
        else:
            run.load_state_dict(state)
        yield run
        run.check()


class SparseRun:
    """The supports of one training run, its counters, and the state to continue it from."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        total_steps: int,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        group: Any = None,
    ) -> None:
        if isinstance(trainer, type) or not isinstance(trainer, Trainer):
            raise UsageError(f"{trainer!r} is not an instance of a training method")
        check_total(total_steps)
        self.model, self._ranks = unwrapped(model, group)
        self.trainer, self.total_steps = trainer, total_steps
        self.layers = trained_layers(self.model, include, exclude, trainer.scales)
        self.left_out = left_dense(self.model, self.layers, exclude)
        """Why the other prunable weights train dense, by name."""
        warn_dense(self.left_out)
        self.followed = follow(optimizer, [x.weight for x in self.layers])
        self.optimizer = self.followed.optimizer
        check_held(self.model, self.optimizer, self.layers)
        check_kept(self.model, self.layers, exclude, trainer.card.name)
        frozen = frozen_layers(self.model, include, exclude, trainer.scales)
        self._guard = Guard(self.layers, frozen, self.followed.name)
        for layer in self.layers:
            check_pattern(trainer.pattern, layer.matrix_shape, layer.name)
        self.step = 0
        self.changed = 0
        """Mask entries that the last update flipped: the SAD of two successive supports."""
        self.masks: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._ever: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._entered: list[int] = []

    def start(self, loss: Callable[[], Tensor] | None = None) -> None:
        """Choose the first supports and apply them; the model is untouched if that fails."""
        gradients: dict[str, Tensor] = {}
        self._ranks.agree(self._generator)
        if self.trainer.gradients_at_start:
            name = self.trainer.card.name
            gradients = start_gradients(self.model, self.layers, loss, name, self._ranks)
        masks = self.trainer.start(self._infos(), gradients, self._generator)
        self._check(masks)
        self._ranks.check_equal(masks)
        if self.trainer.owns:
            self._own = self.trainer.own(self._infos(), self._generator)
        if self.trainer.dense:
            self._hidden = {x.name: x.matrix(x.weight).clone() for x in self.layers}
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        self._ever = {name: mask.clone() for name, mask in masks.items()}
        self._apply()
        self._guard.begin(self.step)

    @property
    def supports(self) -> dict[str, Support]:
        """The kept weights by layer, as matrices."""
        pattern = self.trainer.pattern
        return {
            name: Support(mask.clone(), pattern, float(mask.double().mean()))
            for name, mask in self.masks.items()
        }

    @property
    def density(self) -> float:
        """The measured share of kept weights over all layers in the run; checked as by `check`."""
        self.check()
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return kept / sum(mask.numel() for mask in self.masks.values())

    @property
    def itop_rate(self) -> float:
        """The share of weights that were ever in the support (In-Time Over-Parameterization)."""
        seen = sum(int(mask.sum()) for mask in self._ever.values())
        return seen / sum(mask.numel() for mask in self._ever.values())

    def check(self) -> None:
        """Raise UsageError for weights of this rank outside the supports, or changed unseen."""
        self._guard.check(self.step, self.masks)

    def apply_to(self, model: nn.Module) -> float:
        """Zero the weights outside the current supports in a copy or an average of the model.

        model: an `AveragedModel` (EMA, SWA), a deep copy, or the model in training itself, after
        other weights were loaded into it. Returns the share that was dropped, as the norm of it
        over the norm of all weights of these layers; where it is large, average only after the
        supports stopped moving. Batch norms of an average want new statistics afterwards.
        """
        return mask_copy(self.layers, self.masks, model)

    def mask_gradients(self) -> None:
        """Zero the gradients outside the support; first keep them whole where growth needs them.

        Called before every step; call it yourself before clipping gradients. Methods with dense
        weights behind the support keep all gradients.
        """
        if self._wants_gradients():
            self._gradients = whole_gradients(self.layers, self.trainer.card.name, self._ranks)
        if not self.trainer.dense:
            self._mask_gradients()

    def before_step(self) -> None:
        """Check gradients, mask or refine them, and put dense weights in place for the step."""
        if getattr(self.optimizer, "found_inf", None) is not None:
            raise UsageError(
                "a fused optimizer that skips steps on its own hides them from sparse training; "
                "construct it with fused=False"
            )
        self._follow_devices()
        if self._wants_gradients() and not self._gradients:
            self.mask_gradients()
        try:
            self._guard.check_step(self.masks, self._gradients, self._ranks)
        except UsageError:
            self._gradients = {}
            raise
        self._take_over()
        if self.trainer.dense or self.trainer.owns:
            self._refine()
        if not self.trainer.dense:
            self._mask_gradients()
        for layer in self.layers:
            if self.trainer.dense:
                layer.write(layer.weight, self._hidden[layer.name])

    def after_step(self) -> None:
        """Count the step, hold the support against momentum and decay, then let it change."""
        self.step += 1
        if self.trainer.dense:
            for layer in self.layers:
                self._hidden[layer.name].copy_(layer.matrix(layer.weight))
        else:
            self._apply()
        if self.trainer.shrinks:
            self._shrink()
        gradients, self._gradients = self._gradients, {}
        if self.step > self.total_steps or not self.trainer.due(self.step, self.total_steps):
            if self.trainer.dense:
                self._apply()
            return
        before = self.masks
        passed = self.trainer.update(
            self.step, self.total_steps, self._infos(), gradients, before, self._generator
        )
        for masks in passed:
            self._check(masks)
            if not self.trainer.dense:
                self._ranks.check_equal(masks)
        for masks in passed:
            self.masks = {name: mask.clone() for name, mask in masks.items()}
            self._apply()
        self.changed = sum(int((before[n] ^ mask).sum()) for n, mask in self.masks.items())
        for name, mask in self.masks.items():
            self._ever[name] |= mask

    def before_wrapper(self) -> None:
        """Note where a step of a wrapper around the optimizer begins."""
        self._entered.append(self.step)

    def after_wrapper(self) -> None:
        """Hold the support against what a wrapper did after the optimizer's step, as Lookahead
        does when it moves to its slow weights."""
        if self._entered.pop() == self.step:
            return  # no step within: what changed then is for `check` to find
        self._take_over()
        self._apply()

    def before_ascent(self) -> None:
        """Keep a perturbation of the weights, for one gradient, inside the support."""
        self._mask_gradients()

    def after_ascent(self) -> None:
        """The same against what it adds beside the gradient."""
        for layer in self.layers:
            layer.clear(layer.weight, self.masks[layer.name])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run needs to continue bit for bit, as tensors and plain numbers.

        Save it beside the model's and the optimizer's own state. Checked as by `check`.
        """
        self.check()

        def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.clone() for name, tensor in tensors.items()}

        return {
            "version": VERSION,
            "trainer": repr(self.trainer),
            "pattern": format_pattern(self.trainer.pattern),
            "step": self.step,
            "total_steps": self.total_steps,
            "changed": self.changed,
            "generator": self._generator.get_state(),
            "masks": copies(self.masks),
            "ever": copies(self._ever),
            "hidden": copies(self._hidden),
            "own": copies(self._own),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises FormatError, nothing changed, if it does not fit."""
        mine = {"version": VERSION, "trainer": repr(self.trainer), "total_steps": self.total_steps}
        shapes = {x.name: x.matrix_shape for x in self.layers}
        want: dict[str, Mapping[str, Any]] = dict.fromkeys(("masks", "ever"), shapes)
        if self.trainer.dense:
            want["hidden"] = shapes
        if self.trainer.owns:
            own = self.trainer.own(self._infos(), torch.Generator())
            want["own"] = {name: tensor.shape for name, tensor in own.items()}
        check_state(state, mine, want)

        def copies(part: str) -> dict[str, Tensor]:
            device = {x.name: x.weight.device for x in self.layers}
            return {name: tensor.to(device[name]).clone() for name, tensor in state[part].items()}

        self._generator.set_state(state["generator"].cpu())
        self.step, self.changed = int(state["step"]), int(state["changed"])
        self.masks, self._ever = copies("masks"), copies("ever")
        self._hidden = copies("hidden") if self.trainer.dense else {}
        self._own = copies("own") if self.trainer.owns else {}
        self._apply()
        self._guard.begin(self.step)

    def _take_over(self) -> None:
        """Dense weights behind the support learn of what changed the kept ones since."""
        for layer in self.layers if self.trainer.dense else ():
            hidden, mask = self._hidden[layer.name], self.masks[layer.name]
            hidden.copy_(torch.where(mask, layer.matrix(layer.weight), hidden))

    def _follow_devices(self) -> None:
        """Masks and the like lie where the weights are, also after `model.to(...)`."""
        for layer in self.layers:
            for tensors in (self.masks, self._ever, self._hidden, self._own):
                if layer.name in tensors:
                    tensors[layer.name] = tensors[layer.name].to(layer.weight.device)

    def _wants_gradients(self) -> bool:
        return self.trainer.gradients_at_update and self.trainer.due(
            self.step + 1, self.total_steps
        )

    def _infos(self) -> list[LayerInfo]:
        return [
            LayerInfo(
                x.name,
                tuple(x.weight.shape),
                x.block,
                self._hidden[x.name] if x.name in self._hidden else x.matrix(x.weight),
                own=self._own.get(x.name),
            )
            for x in self.layers
        ]

    def _check(self, masks: Mapping[str, Tensor]) -> None:
        for layer in self.layers:
            mask = masks[layer.name]
            if not bool(mask.any()):
                raise UsageError(
                    f"{layer.name}: {self.trainer.card.name} would leave no weight; keep more "
                    "weights or exclude this layer"
                )

    @torch.no_grad()
    def _refine(self) -> None:
        """Let the trainer learn from the gradients of this step and change them."""
        for layer, info in zip(self.layers, self._infos(), strict=True):
            if layer.weight.grad is not None:
                gradient, mask = layer.matrix(layer.weight.grad), self.masks[layer.name]
                refined = self.trainer.refine(info, gradient, mask)
                if self.trainer.owns:
                    self._own[layer.name] = self.trainer.learn(info, gradient, mask)
                layer.write(layer.weight.grad, refined)

    def _mask_gradients(self) -> None:
        for layer in self.layers:
            if layer.weight.grad is not None:
                layer.clear(layer.weight.grad, self.masks[layer.name])

    def _shrink(self) -> None:
        shrunk = self.trainer.shrink(self.step, self.total_steps, self._infos(), self.masks)
        for layer in self.layers:
            if layer.name in shrunk:
                layer.write(layer.weight, shrunk[layer.name])

    def _apply(self) -> None:
        """Exact zeros outside the support, in weights and, unless dense, in optimizer state.

        A weight that enters the support was outside before, so it starts from zero with fresh
        state.
        """
        for layer in self.layers:
            mask = self.masks[layer.name]
            if self.trainer.dense:
                hidden = self._hidden[layer.name]
                layer.write(layer.weight, hidden.masked_fill(~mask, 0))
                continue
            layer.clear(layer.weight, mask)
            for _, _, value in self.followed.states(layer.weight):
                layer.clear(value, mask)


__all__ = ["SparseRun", "TrainedLayer", "sparse_training"]
