"""One run of learned masks: modules between stored weights and what the layers compute with.

A mask is a torch parametrization, so that every forward, eager or compiled, sees its effective
weight and autograd reaches its parameters. Everything that it keeps lies in the model's own state
dict while the run is open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.core.allocation import LayerInfo
from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.matrix import is_transposed
from gossamer.core.pattern import check_pattern, format_pattern
from gossamer.core.step import Step
from gossamer.core.support import Support
from gossamer.engine.protocols import AddsLoss, LearnedMask, Mask
from gossamer.engine.train.distributed import is_sharded, unwrapped
from gossamer.engine.train.guard import all_finite, check_state, check_total, fingerprint
from gossamer.engine.train.layers import (
    TrainedLayer,
    check_held,
    chosen_layers,
    left_dense,
    unfrozen_layers,
    warn_dense,
)
from gossamer.engine.train.optimizers import follow
from gossamer.engine.train.state import rates_of

VERSION = 1


class MaskedWeight(nn.Module):
    """The parametrization of one weight: its mask, which works on matrices (out, in)."""

    def __init__(self, mask: nn.Module, transposed: bool) -> None:
        super().__init__()
        self.mask, self.transposed = mask, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in the layout of the stored one."""
        return self.tensor(self.mask(self.matrix(weight)), weight.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out, in); gradients pass through."""
        if weight.dim() == 4:
            return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
        return weight.t() if self.transposed else weight

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`."""
        if len(shape) == 4:
            out, channels, height, width = shape
            return matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2)
        return matrix.t() if self.transposed else matrix


class LearnedRun:
    """The masks of one training run, its counter, and the state to continue it from."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: LearnedMask,
        total_steps: int,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        check_total(total_steps)
        _check_alone(model)
        self.model, self.method, self.total_steps = model, method, total_steps
        choose = chosen_layers if method.freezes else unfrozen_layers
        self.layers = choose(model, include, exclude)
        self.left_out = left_dense(model, self.layers, exclude)
        """Why the other prunable weights train without a mask, by name."""
        if not method.freezes:
            warn_dense(self.left_out)
        self.followed = follow(optimizer, [x.weight for x in self.layers])
        self.optimizer = self.followed.optimizer
        if not method.freezes:
            check_held(model, self.optimizer, self.layers)
        _check_untied(model, self.layers)
        for layer in self.layers:
            check_pattern(method.pattern, layer.matrix_shape, layer.name)
        self.step = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._views: dict[str, MaskedWeight] = {}
        self._supports: dict[str, Support] = {}
        self._resting: dict[str, nn.Parameter] = {}
        self._expected: list[tuple[float, float]] = []
        self._begun = 0

    def start(self) -> None:
        """Put masks between weights and layers, and their parameters into the optimizer."""
        step = self._step()
        masks = {x.name: self.method.mask(x, step) for x in step.layers}
        for name, mask in masks.items():
            if not isinstance(mask, nn.Module) or not isinstance(mask, Mask):
                raise UsageError(f"{name}: a mask is a module with forward, advance and finish")
        parameters = [p for mask in masks.values() for p in mask.parameters()]
        if parameters and getattr(self.optimizer.step, "_wrapped_by_lr_sched", False):
            raise UsageError(
                "a learning rate schedule was made for the optimizer before its masks joined it; "
                "make the schedule inside the block of sparse_training"
            )
        for layer in self.layers:
            mask = masks[layer.name].to(layer.weight.device).train(layer.module.training)
            view = MaskedWeight(mask, is_transposed(layer.module)).train(layer.module.training)
            self._views[layer.name] = view
        self._advance()
        if self.method.freezes:
            self._resting = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for layer in self.layers:
            parametrize.register_parametrization(
                layer.module, "weight", self._views[layer.name], unsafe=True
            )
        for parameter in self._resting.values():
            parameter.requires_grad_(False)
        if parameters:
            self.optimizer.add_param_group(self._group(parameters))
        self._expected = self._fingerprint()

    @property
    def supports(self) -> dict[str, Support]:
        """The weights that would be kept if training ended now, by layer, as matrices."""
        if self._supports:
            return dict(self._supports)
        with torch.no_grad():
            return {x.name: self._finished(x) for x in self.layers}

    @property
    def density(self) -> float:
        """The share of weights, over all layers of the run, that would be kept now."""
        found = self.supports.values()
        return sum(x.count for x in found) / sum(x.mask.numel() for x in found)

    @property
    def gap(self) -> float:
        """How far the weights that train are from those that would remain: the norm of the
        difference over the norm of what remains. Near 0 where masks have become hard."""
        difference = whole = 0.0
        with torch.no_grad():
            for layer in () if self._supports else self.layers:
                view, weight = self._views[layer.name], self._matrix(layer)
                hard = self._finished(layer).apply(weight).double()
                was = view.training
                view.train()
                difference += float((view.mask(weight).double() - hard).square().sum())
                view.train(was)
                whole += float(hard.square().sum())
        return (difference / whole) ** 0.5 if whole else 0.0

    def before_step(self) -> None:
        """Add the masks' own terms of the loss, and refuse a step that cannot be right."""
        self._check_views()
        if self._expected and self.step == self._begun and self._begun:
            self._check_loaded()
        for name, parameter in self._resting.items():
            if parameter.requires_grad:
                raise UsageError(
                    f"{name}: was made trainable, but {self.method.card.name} learns masks over "
                    "weights that rest; leave it frozen inside the block"
                )
            parameter.grad = None
        self._add_losses()
        for layer in self.layers:
            for value in (layer.weight, *self._views[layer.name].parameters()):
                if value.grad is not None and not all_finite(value.grad):
                    raise NonFiniteError(
                        f"{layer.name}: its gradient holds NaN or infinity; the step is not taken"
                    )

    def after_step(self) -> None:
        """Count the step and let the masks follow their schedules."""
        self.step += 1
        if self.step <= self.total_steps:
            self._advance()

    def state_dict(self) -> dict[str, Any]:
        """The counter and the generator, beside what lies in the state dict of the model.

        Save it with the model's and the optimizer's own, all three inside the block. To continue,
        open the block with `state=` and load the other two inside it.
        """
        self._check_views()
        return {
            "version": VERSION,
            "method": repr(self.method),
            "pattern": format_pattern(self.method.pattern),
            "step": self.step,
            "total_steps": self.total_steps,
            "generator": self._generator.get_state(),
            "weights": [list(pair) for pair in self._fingerprint()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises FormatError, nothing changed, if it does not fit."""
        facts = {"version": VERSION, "method": repr(self.method), "total_steps": self.total_steps}
        check_state(state, facts, {})
        self._generator.set_state(state["generator"].cpu())
        self.step = self._begun = int(state["step"])
        self._expected = [(float(a), float(b)) for a, b in state["weights"]]

    def finish(self) -> None:
        """Write the weights that remain; the masks and their parameters go.

        Raises UsageError where weights moved without a step, or a layer would lose every weight.
        """
        try:
            self._check_views()
            if self.step == self._begun or self.method.freezes:
                self._check_still()
            supports = self.supports
            for name, support in supports.items():
                if not support.count:
                    raise UsageError(f"{name}: {self.method.card.name} would leave no weight; "
                                     "keep more weights or exclude this layer")  # fmt: skip
        finally:
            self.close()
        self._supports = supports
        with torch.no_grad():
            for layer in self.layers:
                layer.clear(layer.weight, supports[layer.name].mask)

    def close(self) -> None:
        """Take the masks away; the dense weights behind them stay as they are."""
        mine = {id(p) for view in self._views.values() for p in view.parameters()}
        groups = self.optimizer.param_groups
        for group in groups:
            for parameter in group["params"]:
                if id(parameter) in mine:
                    self.optimizer.state.pop(parameter, None)
        groups[:] = [g for g in groups if not any(id(p) in mine for p in g["params"])]
        for layer in self.layers:
            if parametrize.is_parametrized(layer.module, "weight"):
                parametrize.remove_parametrizations(layer.module, "weight", False)
                layer.module._parameters.update(_weight_first(layer.module))
        for parameter in self._resting.values():
            parameter.requires_grad_(True)

    def _group(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        group: dict[str, Any] = {"params": parameters, "weight_decay": 0.0}
        if "weight_decay" not in self.optimizer.defaults:
            del group["weight_decay"]
        if self.method.rate is not None:
            group["lr"] = self.method.rate
        return group

    def _matrix(self, layer: TrainedLayer) -> Tensor:
        view = self._views.get(layer.name)  # the layer's own weight is computed once it has one
        return layer.matrix(layer.weight) if view is None else view.matrix(layer.weight.detach())

    def _finished(self, layer: TrainedLayer) -> Support:
        return cast(Mask, self._views[layer.name].mask).finish(self._matrix(layer))

    def _step(self) -> Step:
        return Step(
            self.step, self.total_steps, rates_of(self.optimizer, self.layers),
            [LayerInfo(x.name, tuple(x.weight.shape), x.block, self._matrix(x))
             for x in self.layers],
            {}, self._generator, dict,
        )  # fmt: skip

    @torch.no_grad()
    def _advance(self) -> None:
        step = self._step()
        for layer in self.layers:
            cast(Mask, self._views[layer.name].mask).advance(step)

    def _add_losses(self) -> None:
        with torch.enable_grad():
            for layer in self.layers:
                view = self._views[layer.name]
                if isinstance(view.mask, AddsLoss):
                    view.mask.loss(view.matrix(layer.weight)).backward()

    def _fingerprint(self) -> list[tuple[float, float]]:
        views = [p for x in self.layers for p in self._views[x.name].parameters()]
        return fingerprint([*(x.weight for x in self.layers), *views])

    def _check_still(self) -> None:
        """Raise UsageError where the weights, of which no step was seen, have moved."""
        count = len(self.layers)
        found, expected = self._fingerprint(), self._expected
        if self.step != self._begun:
            found, expected = found[:count], expected[:count]
        if not _same(found, expected):
            raise UsageError(
                f"weights or masks changed, but not in a step of {self.followed.name} that was "
                "seen; call its step(), or pass the optimizer whose step() the loop calls"
            )

    def _check_loaded(self) -> None:
        if not _same(self._fingerprint(), self._expected):
            raise UsageError(
                "the weights or masks are not those with which state= was saved; load the model's "
                "state dict inside the block, where it was saved"
            )

    def _check_views(self) -> None:
        for layer in self.layers:
            found: Any = getattr(layer.module, "parametrizations", {})
            chain = found["weight"] if "weight" in found else None  # noqa: SIM401
            mine = [self._views[layer.name]]
            if chain is None or list(chain) != mine or chain.original is not layer.weight:
                raise UsageError(
                    f"{layer.name}: its weight or its mask was replaced since the run began; end "
                    "the run before you change either"
                )


def _same(found: Sequence[tuple[float, float]], expected: Sequence[tuple[float, float]]) -> bool:
    """Whether sums and norms agree, but for the order in which devices add."""
    return len(found) == len(expected) and all(
        abs(total - other) <= 1e-9 * norm and abs(size - norm) <= 1e-9 * norm
        for (total, size), (other, norm) in zip(found, expected, strict=True)
    )


def _check_alone(model: nn.Module) -> None:
    """Raise UsageError for a model that is wrapped or sharded, before masks could join it."""
    if unwrapped(model)[0] is not model or any(is_sharded(p) for p in model.parameters()):
        raise UsageError(
            f"{type(model).__name__}: learned masks are put into a model before it is wrapped, "
            "sharded or compiled; give the model itself and wrap it inside the block"
        )


def _check_untied(model: nn.Module, layers: Sequence[TrainedLayer]) -> None:
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            names.setdefault(id(parameter), []).append(path)
    for layer in layers:
        others = [x for x in names[id(layer.weight)] if x != layer.name]
        if others:
            raise UsageError(
                f"{layer.name}: its weight is tied to {others[0]}, which would not see its mask; "
                "untie or exclude it"
            )


def _weight_first(module: nn.Module) -> dict[str, Any]:
    """The parameters of a layer in the order in which it made them, taken out of it."""
    parameters = dict(module._parameters)
    module._parameters.clear()
    return {"weight": parameters.pop("weight"), **parameters}
