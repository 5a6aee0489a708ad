"""What a sparse run checks of the weights: that they change in steps it sees, and stay inside.

Whatever else changes weights (SAM's second step, an average copied in, a loop's own update) shows
in one of two ways: weights outside the support that are not zero, or other weights than at the
start though no step was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import FormatError, NonFiniteError, UsageError
from gossamer.engine.train.distributed import Ranks, is_sharded, local, local_part, unwrapped
from gossamer.engine.train.layers import TrainedLayer


def stray_weights(
    layers: Sequence[TrainedLayer], masks: Mapping[str, Tensor], optimizer: str
) -> UsageError | None:
    """An error that says which layer holds weights outside its support, and how to mend it.

    Looks at what this rank holds. Three passes over a byte for each weight, beside one over them.
    """
    for layer in layers:
        weight = local(layer.weight)
        mask = local_part(layer.tensor(masks[layer.name]), layer.weight)
        outside = weight.bool() > mask.to(weight.device)
        if bool(outside.any()):
            return UsageError(
                f"{layer.name}: {int(outside.sum())} weights outside the support are not zero, so "
                f"they were changed by something else than a step of {optimizer} that was seen. "
                "After loading or averaging weights call apply_to(model) of the run; pass "
                "the optimizer whose step() the loop calls, and change weights by it alone"
            )
    return None


class Guard:
    """Watches the layers of one run for what no hook shows.

    frozen: layers left alone because they are frozen. optimizer: the name of what was given.
    """

    def __init__(
        self, layers: Sequence[TrainedLayer], frozen: Sequence[TrainedLayer], optimizer: str
    ) -> None:
        self.layers, self.frozen, self.optimizer = layers, frozen, optimizer
        self._begun = 0
        self._first: list[tuple[float, float]] = []

    def begin(self, step: int) -> None:
        """From here on weights change in steps alone."""
        self._begun, self._first = step, fingerprint([x.weight for x in self.layers])

    def check(self, step: int, masks: Mapping[str, Tensor]) -> None:
        """Raise UsageError for weights outside the supports, or changed without a step."""
        error = stray_weights(self.layers, masks, self.optimizer)
        if error is None and self._first and step == self._begun:
            check_unmoved([x.weight for x in self.layers], self._first, self.optimizer)
        if error is not None:
            raise error

    def check_step(
        self, masks: Mapping[str, Tensor], gradients: Mapping[str, Tensor], ranks: Ranks
    ) -> None:
        """Raise, on all ranks together, before a step that cannot be right."""
        error = self._thawed() or self._replaced()
        error = error or stray_weights(self.layers, masks, self.optimizer)
        error = error or self._bad_gradient(gradients)
        worst = ranks.largest(0 if error is None else 1 + isinstance(error, NonFiniteError))
        if error is not None:
            raise error
        if worst > 1:
            raise NonFiniteError("a layer of another rank: its gradient holds NaN or infinity; the "
                                 "step is not taken")  # fmt: skip
        if worst:
            raise UsageError("another rank refuses this step, and says why; it is not taken")

    def _replaced(self) -> UsageError | None:
        for layer in self.layers:
            # FSDP2 exchanges the parameter of the module for a gathered one and back.
            if layer.module.weight is not layer.weight and not is_sharded(layer.weight):
                return UsageError(
                    f"{layer.name}: its weight was replaced by another parameter since the run "
                    "began, which nothing masks; end the run, replace it, and open the run again "
                    "with state= and a new optimizer"
                )
        return None

    def _thawed(self) -> UsageError | None:
        for layer in self.frozen:
            if layer.weight.requires_grad:
                return thawed(layer.name)
        return None

    def _bad_gradient(self, gradients: Mapping[str, Tensor]) -> UsageError | None:
        for layer in self.layers:
            for gradient in (layer.weight.grad, gradients.get(layer.name)):
                if gradient is not None and not all_finite(local(gradient)):
                    return NonFiniteError(
                        f"{layer.name}: its gradient holds NaN or infinity; the step is not taken"
                    )
        return None


def thawed(name: str) -> UsageError:
    """The error for a layer that was left alone because it was frozen, and is trained now."""
    return UsageError(
        f"{name}: was frozen when the run began and is trainable now, so it would train without "
        "the method; exclude it, or unfreeze it before the run begins"
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # NaN and infinity make the sum one of them; a sum that overflows is looked into.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def fingerprint(weights: Sequence[Tensor]) -> list[tuple[float, float]]:
    """The sum and the norm of each weight, or of this rank's part: what a step would change."""
    parts = [local(weight) for weight in weights]
    return [
        (
            float(part.sum(dtype=torch.float64)),
            float(torch.linalg.vector_norm(part, dtype=torch.float64)),
        )
        for part in parts
    ]


def check_unmoved(
    weights: Sequence[Tensor], first: Sequence[tuple[float, float]], optimizer: str
) -> None:
    """Raise UsageError unless the weights, of which no step was seen, are those of the start."""
    if fingerprint(weights) != first:
        raise UsageError(
            f"the weights changed but no step of {optimizer} was seen, so neither masks nor "
            "schedules followed; call its step(), or pass the optimizer whose step() the loop calls"
        )


def check_total(total_steps: Any) -> None:
    """Raise UsageError unless it is a number of steps."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise UsageError(f"total_steps is a whole number of at least 1, not {total_steps!r}")


def check_not_empty(
    layers: Sequence[TrainedLayer], masks: Mapping[str, Tensor], method: str
) -> None:
    """Raise UsageError for a layer that would lose every weight."""
    for layer in layers:
        if not bool(masks[layer.name].any()):
            raise UsageError(
                f"{layer.name}: {method} would leave no weight; keep more weights or exclude this "
                "layer"
            )


def check_state(
    state: Mapping[str, Any], facts: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise FormatError for the state of a run with other facts, or tensors of other shapes."""
    for key, value in facts.items():
        if state.get(key) != value:
            raise FormatError(f"training state: {key} is {state.get(key)!r}, not {value!r}")
    for part, expected in shapes.items():
        found = {name: tensor.shape for name, tensor in state.get(part, {}).items()}
        if found != expected:
            raise FormatError(f"training state: {part} are not those of this model's layers")


@torch.no_grad()
def mask_copy(
    layers: Sequence[TrainedLayer], masks: Mapping[str, Tensor], copy: nn.Module
) -> float:
    """Zero the weights of a copy of the model outside the supports.

    Returns the norm of what was dropped over the norm of all weights of these layers.
    """
    while not isinstance(copy, nn.Module) or isinstance(copy, torch.optim.swa_utils.AveragedModel):
        inner = getattr(copy, "module", None)
        if not isinstance(inner, nn.Module):
            raise UsageError(f"{type(copy).__name__} is no module; give the averaged model itself")
        copy = inner
    modules = dict(unwrapped(copy)[0].named_modules())
    targets = []
    for layer in layers:
        weight = getattr(modules.get(layer.name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
            raise UsageError(
                f"{type(copy).__name__} has no weight of shape {tuple(layer.weight.shape)} in "
                f"{layer.name!r}; give the model in training, or a copy or average of it"
            )
        targets.append(weight)
    before = sum(float(local(x).double().square().sum()) for x in targets)
    for layer, target in zip(layers, targets, strict=True):
        layer.clear(target, masks[layer.name].to(target.device))
    after = sum(float(local(x).double().square().sum()) for x in targets)
    return (max(0.0, before - after) / before) ** 0.5 if before else 0.0
