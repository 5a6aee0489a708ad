"""One run of sparse training: its supports, its counters, and the state to continue it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.allocation import LayerInfo
from gossamer.core.errors import UsageError
from gossamer.core.pattern import check_pattern, format_pattern
from gossamer.core.step import Step
from gossamer.core.support import Support, zero_outside
from gossamer.engine.protocols import (
    EditsGradient,
    EditsWeights,
    FreezesWeights,
    KeepsState,
    LearnsState,
    StartsNewcomers,
    TopologyMethod,
)
from gossamer.engine.train.distributed import unwrapped
from gossamer.engine.train.guard import (
    Guard,
    check_not_empty,
    check_state,
    check_total,
    mask_copy,
)
from gossamer.engine.train.layers import (
    check_held,
    check_kept,
    frozen_layers,
    left_dense,
    start_gradients,
    start_newcomers,
    trained_layers,
    warn_dense,
    whole_gradients,
)
from gossamer.engine.train.optimizers import follow
from gossamer.engine.train.probe import Probe
from gossamer.engine.train.state import flat, nested, rates_of

VERSION = 1


class SparseRun:
    """The supports of one training run, its counters, and the state to continue it from."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: TopologyMethod,
        total_steps: int,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        group: Any = None,
    ) -> None:
        if isinstance(method, type) or not isinstance(method, TopologyMethod):
            raise UsageError(f"{method!r} is not an instance of a training method")
        check_total(total_steps)
        self.model, self._ranks = unwrapped(model, group)
        self.method, self.total_steps = method, total_steps
        self.layers = trained_layers(self.model, include, exclude, method.trains_scales)
        self.left_out = left_dense(self.model, self.layers, exclude)
        """Why the other prunable weights train dense, by name."""
        warn_dense(self.left_out)
        self.followed = follow(optimizer, [x.weight for x in self.layers])
        self.optimizer = self.followed.optimizer
        check_held(self.model, self.optimizer, self.layers)
        check_kept(self.model, self.layers, exclude, method.card.name)
        frozen = frozen_layers(self.model, include, exclude, method.trains_scales)
        self._guard = Guard(self.layers, frozen, self.followed.name)
        for layer in self.layers:
            check_pattern(method.pattern, layer.matrix_shape, layer.name)
        self.step = 0
        self.changed = 0
        """Mask entries that the last update flipped: the SAD of two successive supports."""
        self.masks: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._ever: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}
        self._state: dict[str, dict[str, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._frozen: dict[str, tuple[Tensor, Tensor]] = {}
        self._entered: list[int] = []

    def start(self, loss: Callable[[], Tensor] | None = None) -> None:
        """Choose the first supports and apply them; the model is untouched if that fails."""
        self._ranks.agree(self._generator)
        given = (self.model, self.layers, loss, self.method.card.name, self._ranks)
        probe = Probe(*given)
        step = replace(
            self._step(0, lambda: start_gradients(*given)), loss=probe.loss, outputs=probe.outputs
        )
        masks = self.method.start(step)
        check_not_empty(self.layers, masks, self.method.card.name)
        self._ranks.check_equal(masks)
        if isinstance(self.method, KeepsState):
            self._state = self.method.first_state(step)
        if self.method.keeps_dense_weights:
            self._hidden = {x.name: x.matrix(x.weight).clone() for x in self.layers}
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        self._ever = {name: mask.clone() for name, mask in masks.items()}
        self._apply()
        self._guard.begin(self.step)

    @property
    def supports(self) -> dict[str, Support]:
        """The kept weights by layer, as matrices."""
        pattern = self.method.pattern
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
            self._gradients = whole_gradients(self.layers, self.method.card.name, self._ranks)
        if not self.method.keeps_dense_weights:
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
        self._show_gradients()
        if not self.method.keeps_dense_weights:
            self._mask_gradients()
        for layer in self.layers:
            if self.method.keeps_dense_weights:
                layer.write(layer.weight, self._hidden[layer.name])
        self._freeze()

    def after_step(self) -> None:
        """Count the step, hold the support against momentum and decay, then let it change."""
        self.step += 1
        self._thaw()
        if self.method.keeps_dense_weights:
            for layer in self.layers:
                self._hidden[layer.name].copy_(layer.matrix(layer.weight))
        else:
            self._apply()
        if isinstance(self.method, EditsWeights):
            self._write(self.method.edit_weights(self._step(self.step)))
        gradients, self._gradients = self._gradients, {}
        if self.step > self.total_steps or not self.method.due(self.step, self.total_steps):
            if self.method.keeps_dense_weights:
                self._apply()
            return
        before = self.masks
        passed = self.method.update(self._step(self.step, lambda: self._needed(gradients)))
        for masks in passed:
            check_not_empty(self.layers, masks, self.method.card.name)
            if not self.method.keeps_dense_weights:
                self._ranks.check_equal(masks)
        for masks in passed:
            self.masks = {name: mask.clone() for name, mask in masks.items()}
            self._apply()
        if isinstance(self.method, StartsNewcomers):
            draw = partial(self.method.newcomers, generator=self._generator)
            start_newcomers(self.layers, [before, *passed], draw)
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
            "method": repr(self.method),
            "pattern": format_pattern(self.method.pattern),
            "step": self.step,
            "total_steps": self.total_steps,
            "changed": self.changed,
            "generator": self._generator.get_state(),
            "masks": copies(self.masks),
            "ever": copies(self._ever),
            "hidden": copies(self._hidden),
            "state": copies(flat(self._state)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises FormatError, nothing changed, if it does not fit."""
        mine = {"version": VERSION, "method": repr(self.method), "total_steps": self.total_steps}
        shapes = {x.name: x.matrix_shape for x in self.layers}
        want: dict[str, Mapping[str, Any]] = dict.fromkeys(("masks", "ever"), shapes)
        if self.method.keeps_dense_weights:
            want["hidden"] = shapes
        if isinstance(self.method, KeepsState):
            first = flat(self.method.first_state(self._step(0)))
            want["state"] = {name: tensor.shape for name, tensor in first.items()}
        check_state(state, mine, want)

        def copies(part: str) -> dict[str, Tensor]:
            device = {x.name: x.weight.device for x in self.layers}
            return {
                name: tensor.to(device[name.partition(":")[0]]).clone()
                for name, tensor in state[part].items()
            }

        self._generator.set_state(state["generator"].cpu())
        self.step, self.changed = int(state["step"]), int(state["changed"])
        self.masks, self._ever = copies("masks"), copies("ever")
        self._hidden = copies("hidden") if self.method.keeps_dense_weights else {}
        self._state = nested(copies("state")) if isinstance(self.method, KeepsState) else {}
        self._apply()
        self._guard.begin(self.step)

    def _take_over(self) -> None:
        """Dense weights behind the support learn of what changed the kept ones since."""
        for layer in self.layers if self.method.keeps_dense_weights else ():
            hidden, mask = self._hidden[layer.name], self.masks[layer.name]
            hidden.copy_(torch.where(mask, layer.matrix(layer.weight), hidden))

    def _follow_devices(self) -> None:
        """Masks and the like lie where the weights are, also after `model.to(...)`."""
        for layer in self.layers:
            for tensors in (self.masks, self._ever, self._hidden):
                if layer.name in tensors:
                    tensors[layer.name] = tensors[layer.name].to(layer.weight.device)
            state = self._state.get(layer.name, {})
            state.update({name: x.to(layer.weight.device) for name, x in state.items()})

    def _wants_gradients(self) -> bool:
        return "gradients" in self.method.card.needs and self.method.due(
            self.step + 1, self.total_steps
        )

    def _needed(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        if not gradients:
            name = self.method.card.name
            raise UsageError(f"{name} asks for gradients, which its card does not say it needs")
        return gradients

    def _step(self, number: int, gradients: Callable[[], Mapping[str, Tensor]] = dict) -> Step:
        return Step(
            number, self.total_steps, rates_of(self.optimizer, self.layers), self._infos(),
            self.masks, self._generator, cache(gradients),
        )  # fmt: skip

    def _infos(self) -> list[LayerInfo]:
        return [
            LayerInfo(
                x.name,
                tuple(x.weight.shape),
                x.block,
                self._hidden[x.name] if x.name in self._hidden else x.matrix(x.weight),
                state=self._state.get(x.name, {}),
            )
            for x in self.layers
        ]

    @torch.no_grad()
    def _show_gradients(self) -> None:
        """Let the method learn from the gradients of this step and change them."""
        edits = self.method if isinstance(self.method, EditsGradient) else None
        learns = self.method if isinstance(self.method, LearnsState) else None
        if edits is None and learns is None:
            return
        step = self._step(self.step + 1)
        for layer, info in zip(self.layers, step.layers, strict=True):
            if layer.weight.grad is None:
                continue
            gradient = layer.matrix(layer.weight.grad)
            edited = edits.edit_gradient(step, info, gradient) if edits else None
            if learns:
                self._state[layer.name] = learns.next_state(step, info, gradient)
            if edited is not None:
                layer.write(layer.weight.grad, edited)

    def _mask_gradients(self) -> None:
        for layer in self.layers:
            if layer.weight.grad is not None:
                layer.clear(layer.weight.grad, self.masks[layer.name])

    def _freeze(self) -> None:
        """Note the values that the coming step must not move."""
        if not isinstance(self.method, FreezesWeights):
            return
        frozen = self.method.frozen(self._step(self.step + 1))
        self._frozen = {
            x.name: (frozen[x.name], x.matrix(x.weight.detach()).clone())
            for x in self.layers
            if x.name in frozen
        }

    def _thaw(self) -> None:
        """Put them back after the step."""
        held, self._frozen = self._frozen, {}
        current = {x.name: x.matrix(x.weight.detach()) for x in self.layers if x.name in held}
        self._write({name: torch.where(*held[name], new) for name, new in current.items()})

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        """Set weights of layers, and the dense ones behind them."""
        for layer in self.layers:
            if layer.name in weights:
                layer.write(layer.weight, weights[layer.name])
                if layer.name in self._hidden:
                    self._hidden[layer.name].copy_(weights[layer.name])

    def _apply(self) -> None:
        """Exact zeros outside the support, in weights and, unless dense, in optimizer state.

        A weight that enters the support was outside before, so it starts from zero with fresh
        state.
        """
        for layer in self.layers:
            mask = self.masks[layer.name]
            if self.method.keeps_dense_weights:
                hidden = self._hidden[layer.name]
                layer.write(layer.weight, zero_outside(hidden.clone(), mask))
                continue
            layer.clear(layer.weight, mask)
            for _, _, value in self.followed.states(layer.weight):
                layer.clear(value, mask)
