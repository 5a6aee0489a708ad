"""Calibration: what each layer needs to choose its inputs, and the thresholds of the scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.activations import InputState, InputStats
from gossamer.core.budget import Fraction, Threshold
from gossamer.core.density import check_density
from gossamer.core.errors import UsageError
from gossamer.core.quantiles import MagnitudeQuantiles, Magnitudes, quantile
from gossamer.core.result import unwrap
from gossamer.engine.data import Batch, call, read_batches, real_tokens
from gossamer.engine.hooks import evaluating, observe_inputs
from gossamer.engine.inputs.activations.blocks import allocate
from gossamer.engine.inputs.activations.layer_plan import LayerPlan, turned
from gossamer.engine.inputs.activations.layers import choose_linears, sharing
from gossamer.engine.inputs.activations.plan import (
    ActivationPlan,
    Chosen,
    Step,
    digest_weights,
)
from gossamer.engine.inputs.activations.protocols import (
    Allocates,
    ChecksLayers,
    InputScorer,
    Rotates,
    check_scorer,
)
from gossamer.engine.progress import track

LEAST = 32
"""Tokens below which calibration says nothing about a quantile."""
SAMPLES = 128
"""Inputs of each layer that methods which need `inputs` are given."""


def calibrate_activations(
    model: nn.Module,
    method: Any,
    data: Iterable[Batch] | None,
    *,
    density: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    facts: Mapping[str, Mapping[str, float]] | None = None,
    progress: bool = False,
) -> ActivationPlan:
    """See `gossamer.calibrate_activations`, which also takes a method by its name."""
    model = unwrap(model)
    method = checked(method, density)
    chosen = choose_linears(model, include, exclude)
    if isinstance(method, ChecksLayers):
        method.check_layers(list(chosen.layers))
    weights = {name: layer.weight for name, layer in chosen.layers.items()}
    if data is None:
        check_needs_no_data(method)
        states = {
            name: method.prepare(weight.detach(), InputStats(name), method.density)
            for name, weight in weights.items()
        }
        return finished(method, chosen, states, {}, {}, dict.fromkeys(states, method.density))
    batches = read_batches(data)
    groups = sharing(model, chosen.layers, lambda: call(model, batches[0]))
    rotations = rotations_of(method, groups, weights)
    samples = _samples(model, chosen, rotations, batches) if "inputs" in method.card.needs else {}
    states = {
        name: method.prepare(
            turned(weight.detach(), rotations.get(name)),
            InputStats(name, samples.get(name), dict((facts or {}).get(name, {}))),
            method.density,
        )
        for name, weight in weights.items()
    }
    seen = _scores(model, method, chosen, rotations, states, batches, progress)
    densities = dict.fromkeys(states, method.density)
    path: tuple[Step, ...] = ()
    if isinstance(method, Allocates) and method.allocation == "greedy" and method.density < 1:
        densities, path = allocate(
            model, method, chosen, rotations, states, seen, batches[0], progress
        )
        states = {name: replace(state, density=densities[name]) for name, state in states.items()}
    numbers = {name: place for place, group in enumerate(groups) for name in group}
    return finished(method, chosen, states, rotations, seen, densities, path, numbers)


def checked(method: Any, density: float | None) -> Any:
    """The method, with another density where one is given; raises UsageError for one of no use."""
    check_scorer(method)
    method = with_density(method, density)
    if not isinstance(method, InputScorer):
        raise UsageError(
            f"{method.card.name} chooses neurons from each prompt: it learns nothing from data; "
            "give it to gs.sparsify_activations"
        )
    return method


def with_density(method: Any, density: float | None) -> Any:
    """The same method, or one with another density."""
    return method if density is None else replace(method, density=check_density(density))


def check_needs_no_data(method: Any) -> None:
    """Raise UsageError where a method's choices cannot be made from the weights alone."""
    greedy = isinstance(method, Allocates) and method.allocation == "greedy"
    if method.density < 1 and (
        not method.per_token
        or greedy
        or "inputs" in method.card.needs
        or (isinstance(method, Rotates) and method.turns)
    ):
        raise UsageError(
            f"{method.card.name} needs calibration data: pass data=, batches as for gs.prune, or "
            "a plan of gs.calibrate_activations"
        )


def rotations_of(
    method: Any, groups: Sequence[Sequence[str]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """V by layer, one tensor for those that share their input."""
    if not isinstance(method, Rotates) or not method.turns or method.density >= 1:
        return {}
    found: dict[str, Tensor] = {}
    for group in groups:
        found.update(method.rotations({name: weights[name].detach() for name in group}))
    return found


def _inputs(x: Tensor, mask: Tensor | None, rotation: Tensor | None) -> Tensor:
    """Inputs of real tokens, (count, in), as the layer multiplies them."""
    if mask is not None and x.shape[: mask.dim()] == mask.shape:
        x = x[mask.to(x.device)]
    x = x.detach().reshape(-1, x.shape[-1])
    return x if rotation is None else x @ rotation.to(x.dtype)


def _samples(
    model: nn.Module, chosen: Chosen, rotations: Mapping[str, Tensor], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Some inputs of every layer, float32, spread over the first batches."""
    found: dict[str, list[Tensor]] = {name: [] for name in chosen.layers}
    for batch in batches[:4]:
        mask = real_tokens(batch)

        def saw(name: str, x: Tensor, mask: Tensor | None = mask) -> None:
            flat = _inputs(x, mask, rotations.get(name))
            step = max(1, len(flat) * min(4, len(batches)) // SAMPLES)
            found[name].append(flat[::step].float())

        with evaluating(model), observe_inputs(chosen.layers, saw):
            call(model, batch)
    return {name: torch.cat(parts)[:SAMPLES] for name, parts in found.items()}


def _scores(
    model: nn.Module,
    method: InputScorer,
    chosen: Chosen,
    rotations: Mapping[str, Tensor],
    states: Mapping[str, InputState],
    batches: Sequence[Batch],
    progress: bool,
) -> dict[str, Magnitudes]:
    """Counts of every layer's scores over all data; raises UsageError where there is too little."""
    kind = MagnitudeQuantiles()
    seen = {name: kind.init() for name in chosen.layers}
    with track(len(batches), progress, "calibrating") as step:
        for batch in batches:
            mask = real_tokens(batch)

            def saw(name: str, x: Tensor, mask: Tensor | None = mask) -> None:
                flat = _inputs(x, mask, rotations.get(name))
                seen[name] = kind.update(seen[name], method.score(flat, states[name]), name)

            with evaluating(model), observe_inputs(chosen.layers, saw):
                call(model, batch)
            step("")
    for name, layer in chosen.layers.items():
        tokens = seen[name].count // layer.in_features
        if tokens < LEAST:
            raise UsageError(
                f"calibration saw {tokens} tokens of {name}; a quantile needs {LEAST} at least: "
                "give longer windows or more of them"
            )
    return seen


def finished(
    method: Any,
    chosen: Chosen,
    states: Mapping[str, InputState],
    rotations: Mapping[str, Tensor],
    seen: Mapping[str, Magnitudes],
    densities: Mapping[str, float],
    path: tuple[Step, ...] = (),
    groups: Mapping[str, int] | None = None,
) -> ActivationPlan:
    """The plan, with the budget of every layer."""
    layers = {}
    for name, layer in chosen.layers.items():
        state = states[name]
        budget: Threshold | Fraction
        if method.per_token or state.density >= 1:
            budget = Fraction(state.density)
        else:
            budget = Threshold(quantile(seen[name], 1 - state.density))
        layers[name] = LayerPlan(
            name, (layer.out_features, layer.in_features), densities[name], budget, state,
            rotations.get(name), seen[name].zeros if name in seen else None,
            (groups or {}).get(name, 0),
        )  # fmt: skip
    weights = {name: layer.weight for name, layer in chosen.layers.items()}
    return ActivationPlan(method, layers, chosen.left, path, digest_weights(weights))
