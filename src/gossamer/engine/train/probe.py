"""The model before training, as functions of its weights that a method may differentiate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.core.errors import UsageError
from gossamer.engine.calls import Inputs
from gossamer.engine.hooks import adjust_outputs, evaluating, watch_blocks
from gossamer.engine.train.distributed import Ranks, is_sharded
from gossamer.engine.train.layers import TrainedLayer


class Probe:
    """What `Step.loss` and `Step.outputs` are at the start of a run.

    Weights are put in the model's place for one call, and buffers are copies. So nothing has to be
    restored, and the graph stays whole.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TrainedLayer],
        loss: Callable[[], Tensor] | None,
        method: str,
        ranks: Ranks,
    ) -> None:
        self.model, self.layers, self.method = model, layers, method
        self._given, self._ranks = loss, ranks
        self._call: Inputs | None = None

    def loss(self, weights: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        """See `core.step.StartLoss`."""
        if self._ranks.groups:
            raise UsageError(
                f"{self.method} differentiates the loss of one batch, which is not averaged over "
                "ranks; choose the masks on one rank and train under gs.weights.FixedMasks(masks)"
            )
        seen: list[Any] = []

        def divide(_: Tensor, output: Any) -> Any:
            seen.append(output)
            return self._divided(output, temperature)

        scaled = [(self.model, divide)] if temperature != 1 else []
        # Fused attention has no second derivative.
        with adjust_outputs(scaled), sdpa_kernel(SDPBackend.MATH):
            value = self._run_loss(weights)
        if scaled and not seen:
            raise UsageError(
                f"{self.method} divides the outputs of {type(self.model).__name__} by "
                f"{temperature:g}, but loss= does not call it; call the model itself there, or set "
                "temperature=1"
            )
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise UsageError(
                f"{self.method}: the loss has no gradient; was it computed in no_grad?"
            )
        return value

    def outputs(self, weights: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
        """See `core.step.StartOutputs`."""
        args, kwargs = self._first_call()
        dtype = next(iter(weights.values())).dtype

        def ones(value: Any) -> Any:
            return self._ones(value, dtype) if isinstance(value, Tensor) else value

        tensors = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        changed = {name: _changed(tensor.detach(), change) for name, tensor in tensors.items()}
        with evaluating(self.model), torch.enable_grad():
            output = functional_call(
                self.model,
                {**changed, **self._placed(weights)},
                tuple(map(ones, args)),
                {key: ones(value) for key, value in kwargs.items()},
            )
        found = getattr(output, "logits", output)
        if not isinstance(found, Tensor):
            raise UsageError(
                f"{self.method} sums the outputs of {type(self.model).__name__}, which returns "
                f"{type(output).__name__}; have it return a tensor"
            )
        return found

    def _run_loss(self, weights: Mapping[str, Tensor]) -> Any:
        if self._given is None:
            raise UsageError(f"{self.method} looks at the model before training: pass loss=, a "
                             "function that returns the loss of one batch")  # fmt: skip
        if any(is_sharded(x.weight) for x in self.layers):
            raise UsageError(
                f"{self.method} needs whole weights, and these are sharded; choose the masks "
                "before fully_shard and train under gs.weights.FixedMasks(masks)"
            )
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        tensors = {f"model.{n}": x for n, x in {**buffers, **self._placed(weights)}.items()}
        with torch.random.fork_rng():
            return functional_call(_Loss(self.model, self._given), tensors, ())

    def _placed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the names of their parameters, in the shapes of these."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        layers = {x.name: x for x in self.layers}
        return {names[id(layers[n].weight)]: layers[n].tensor(w) for n, w in weights.items()}

    def _first_call(self) -> Inputs:
        """The arguments with which the loss calls the model."""
        if self._call is None:
            calls: list[Inputs] = []
            with (
                torch.no_grad(),
                watch_blocks([self.model], lambda _, x: calls.append(x), lambda *_: None),
            ):
                self._run_loss({})
            if not calls:
                raise UsageError(
                    f"{self.method} takes the shape of an input from loss=, which does not call "
                    f"{type(self.model).__name__}; call the model itself there"
                )
            self._call = calls[0]
        return self._call

    def _ones(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if not value.is_floating_point() or not value.dim():
            raise UsageError(
                f"{self.method} passes ones through {type(self.model).__name__}, which takes "
                f"{value.dtype} of shape {tuple(value.shape)}; it serves models whose inputs are "
                "batches of real numbers"
            )
        return torch.ones_like(value[:1], dtype=dtype)

    def _divided(self, output: Any, temperature: float) -> Any:
        if isinstance(output, Tensor):
            return output / temperature
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and getattr(output, "loss", None) is None:
            output.logits = logits / temperature
            return output
        raise UsageError(
            f"{self.method} divides logits by {temperature:g} before the loss, and "
            f"{type(self.model).__name__} returns {type(output).__name__}; compute the loss from "
            "its logits outside of the model, or set temperature=1"
        )


class _Loss(nn.Module):
    """A loss as a module around its model, whose tensors `functional_call` can exchange."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model, self.given = model, loss

    def forward(self) -> Any:
        return self.given()


def _changed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(tensor) if tensor.is_floating_point() else tensor.clone()
