"""The greedy allocation, block after block, on inputs that the dense model gave each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gossamer.core.activations import InputState
from gossamer.core.quantiles import Magnitudes, quantile
from gossamer.engine.calls import Inputs
from gossamer.engine.data import Batch, call
from gossamer.engine.hooks import evaluating, substitute, watch_blocks
from gossamer.engine.inputs.activations.allocate import activation_error, greedy, proportional
from gossamer.engine.inputs.activations.plan import Chosen, Step
from gossamer.engine.inputs.activations.protocols import Allocates
from gossamer.engine.progress import track
from gossamer.models.blocks import find_blocks

TOKENS = 128
"""Positions of one text on which errors of blocks are measured."""
MOST = 0.98
"""No layer of a block becomes sparser."""


def allocate(
    model: nn.Module,
    method: Allocates,
    chosen: Chosen,
    rotations: Mapping[str, Tensor],
    states: Mapping[str, InputState],
    seen: Mapping[str, Magnitudes],
    batch: Batch,
    progress: bool,
) -> tuple[dict[str, float], tuple[Step, ...]]:
    """The density of every layer, and all steps. Layers outside of blocks get the method's own."""
    densities = dict.fromkeys(chosen.layers, method.density)
    blocks = find_blocks(model) or [("", model)]
    caught = _inputs_of(model, [block for _, block in blocks], _one_text(batch))
    path: list[Step] = []
    with evaluating(model), track(len(blocks), progress, "allocating") as tell:
        for (prefix, block), inputs in zip(blocks, caught, strict=True):
            tell(prefix)
            names = [n for n in chosen.layers if n.startswith(f"{prefix}." if prefix else "")]
            if not names or inputs is None:
                continue
            error = _error(block, inputs, names, method, chosen, rotations, states, seen)
            sizes = {name: chosen.layers[name].weight.numel() for name in names}
            found = greedy(proportional(sizes, names), error, method.step, 1 - method.density, MOST)
            path += [Step(*step) for step in found.steps]
            densities.update({name: 1 - value for name, value in found.sparsity.items()})
    return densities, tuple(path)


def _one_text(batch: Batch) -> Batch:
    """The first text of a batch, cut to `TOKENS` where it is token ids."""
    if isinstance(batch, Tensor):
        return batch[:1, :TOKENS] if batch.dim() == 2 and not batch.is_floating_point() else batch
    cut = {}
    for key, value in batch.items():
        tokens = isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
        cut[key] = value[:1, :TOKENS] if tokens else value
    return cut


def _inputs_of(
    model: nn.Module, blocks: list[nn.Module], batch: Batch
) -> list[tuple[Inputs, Tensor] | None]:
    """What each block is called with in a dense run, and what it returns."""
    inputs: dict[int, Inputs] = {}
    found: list[tuple[Inputs, Tensor] | None] = [None] * len(blocks)

    def after(index: int, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        found[index] = (inputs[index], tensor)

    with evaluating(model), watch_blocks(blocks, inputs.__setitem__, after):
        call(model, batch)
    return found


def _error(
    block: nn.Module,
    inputs: tuple[Inputs, Tensor],
    names: list[str],
    method: Allocates,
    chosen: Chosen,
    rotations: Mapping[str, Tensor],
    states: Mapping[str, InputState],
    seen: Mapping[str, Magnitudes],
) -> Callable[[Mapping[str, float]], float]:
    """The error of the block's output as a function of its layers' sparsities."""
    (args, kwargs), dense = inputs

    def forward(name: str, limit: float) -> Callable[[Tensor], Tensor]:
        layer, rotation = chosen.layers[name], rotations.get(name)

        def masked(x: Tensor) -> Tensor:
            given = x if rotation is None else x @ rotation.to(x.dtype)
            kept = given.masked_fill(~(method.score(given, states[name]) > limit), 0)
            if rotation is not None:
                kept = kept @ rotation.t().to(x.dtype)
            return nn.functional.linear(kept, layer.weight, layer.bias)

        return masked

    def error(sparsity: Mapping[str, float]) -> float:
        forwards = [
            (chosen.layers[name], forward(name, quantile(seen[name], sparsity[name])))
            for name in names
            if sparsity[name] > 0
        ]
        with substitute(forwards):
            output = block(*args, **kwargs)
        return activation_error(dense, output if isinstance(output, Tensor) else output[0])

    return error
