"""Calibration: input statistics of one unit's layers at a time, behind already pruned ones.

The flow is that of SparseGPT and Wanda: capture the inputs of the first block, and for every block
run it to gather statistics, prune it, run it again, and feed the outputs to the next. A model
whose blocks cannot be chained so (found out by a probe, not assumed) is run whole, once per unit:
slower, with the same statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.matrix import inputs_of
from gossamer.core.stats import ColumnNorm, Hessian, LayerStats, Moment
from gossamer.engine import hooks
from gossamer.engine.data import Batch, call, real_tokens
from gossamer.ops.statistics import add_gram

STATISTICS = ("norm", "hessian")
"""What calibration can gather; a method that needs anything else cannot be served."""


class Gatherer:
    """Accumulates statistics of several layers from their inputs, in float32.

    layers: name -> module. needs: of `STATISTICS`. Rows that are padding do not count.
    """

    def __init__(self, layers: Mapping[str, nn.Module], needs: Sequence[str]) -> None:
        self.layers = dict(layers)
        self.padding: Tensor | None = None
        kinds: dict[str, ColumnNorm | Hessian]
        kinds = {"norm": ColumnNorm(), "hessian": Hessian(add=add_gram)}
        self._accumulators = {need: kinds[need] for need in needs}
        self._states: dict[tuple[str, str], Moment] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add one input of a layer; raises NonFiniteError naming the layer."""
        module = self.layers[name]
        if not x.is_floating_point():
            raise UsageError(f"{name}: its inputs are {x.dtype}, which give no statistics")
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"{name}: NaN or inf among its calibration inputs; check the data, or run the "
                "model in float32"
            )
        mask = self.padding
        if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
            x = x[mask.to(x.device)]
        rows = inputs_of(module, x).float()
        for need, accumulator in self._accumulators.items():
            state = self._states.get((name, need))
            if state is None:
                state = accumulator.init(rows.shape[-1])
                state = replace(state, total=state.total.to(rows.device))
            self._states[name, need] = accumulator.update(state, rows)

    def finish(self) -> dict[str, LayerStats]:
        """The statistics by layer; raises UsageError for a layer that saw no input."""
        done = {}
        for name in self.layers:
            parts = {}
            for need, accumulator in self._accumulators.items():
                state = self._states.pop((name, need), None)
                parts[need] = None if state is None else accumulator.finalize(state, name)
            seen = [part for part in parts.values() if part is not None]
            if not seen or not seen[0].count:
                raise UsageError(
                    f"{name}: saw no calibration input; give more data or exclude this layer"
                )
            norm, hessian = parts.get("norm"), parts.get("hessian")
            done[name] = LayerStats(
                name=name,
                count=seen[0].count,
                norm=norm.norm if norm else None,
                hessian=hessian.hessian if hessian else None,
            )
        return done


@dataclass
class _Chain:
    """The inputs of block `position` for every batch."""

    inputs: list[hooks.Inputs]
    position: int = 0


class Calibrator:
    """Gathers statistics unit by unit, in order; call it inside `hooks.evaluating(model)`.

    blocks: what `find_blocks` gave. `order` maps a layer's name to its place in the first call of
    the model; a layer that was never called is absent. `chained` says how blocks are run.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        layers: Mapping[str, nn.Module],
        batches: Sequence[Batch],
    ) -> None:
        self.model, self.batches = model, batches
        self.blocks = [block for _, block in blocks]
        self._chain: _Chain | None = None
        self.order, self.chained = probe(model, self.blocks, layers, batches[0])

    def gather(
        self, layers: Mapping[str, nn.Module], block: int | None, needs: Sequence[str]
    ) -> dict[str, LayerStats]:
        """Statistics of one unit's layers. A chained block must not come before an earlier one."""
        gatherer = Gatherer(layers, needs)
        # Reach the block before watching: getting there runs the model too.
        chain = None if block is None or not self.chained else self._advance_to(block)
        with hooks.observe_inputs(layers, gatherer.add):
            for index, batch in enumerate(self.batches):
                gatherer.padding = real_tokens(batch)
                if chain is None:
                    call(self.model, batch)
                else:
                    _run(self.blocks[chain.position], chain.inputs[index])
        return gatherer.finish()

    def _advance_to(self, block: int) -> _Chain:
        if self._chain is None:
            captured = hooks.capture_first_block_inputs(
                self.model, self.blocks[0], self.batches, lambda batch: call(self.model, batch)
            )
            self._chain = _Chain(captured)
        chain = self._chain
        while chain.position < block:
            module = self.blocks[chain.position]
            for index, inputs in enumerate(chain.inputs):
                chain.inputs[index] = _with_hidden(inputs, _run(module, inputs))
            chain.position += 1
        return chain


def gather_dense(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    needs: Sequence[str],
) -> dict[str, LayerStats]:
    """Statistics of all layers at once over the model as it is; meant for the small `norm`.

    Call it inside `hooks.evaluating(model)`.
    """
    gatherer = Gatherer(layers, needs)
    with hooks.observe_inputs(layers, gatherer.add):
        for batch in batches:
            gatherer.padding = real_tokens(batch)
            call(model, batch)
    return gatherer.finish()


def probe(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    layers: Mapping[str, nn.Module],
    batch: Batch,
) -> tuple[dict[str, int], bool]:
    """One call of the model: in which order layers run, and whether blocks form a chain.

    They do when each is called once, in order, and running block k on its hidden state with the
    first block's other arguments gives the input of block k+1.
    """
    watched = {f"block {index}": block for index, block in enumerate(blocks)}
    places: dict[str, int] = {}

    def place(name: str, _: Tensor) -> None:
        places.setdefault(name, len(places))

    with hooks.observe_inputs(layers, place), hooks.record_calls(watched) as calls:
        call(model, batch)
    if [name for name, _ in calls] != list(watched) or not calls:
        return places, False
    first = calls[0][1]
    hidden = [_hidden(inputs) for _, inputs in calls]
    if any(state is None for state in hidden):
        return places, False
    for index in range(len(blocks) - 1):
        given, wanted = hidden[index], hidden[index + 1]
        if not _leads_to(blocks[index], _with_hidden(first, given), wanted):
            return places, False
    return places, True


def _leads_to(block: nn.Module, inputs: hooks.Inputs, wanted: Tensor | None) -> bool:
    try:
        output = _run(block, inputs)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    if not isinstance(output, Tensor) or wanted is None or output.shape != wanted.shape:
        return False
    tolerance = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 2e-2
    difference = (output.float() - wanted.float()).abs().max() if wanted.numel() else 0.0
    scale = wanted.float().abs().max() if wanted.numel() else 1.0
    return not bool(difference > tolerance * scale)


def _run(block: nn.Module, inputs: hooks.Inputs) -> Any:
    """The block's new hidden state; its input is copied, so in-place layers cannot spoil it."""
    args, kwargs = inputs
    hidden = _hidden(inputs)
    if hidden is not None:
        args, kwargs = _with_hidden(inputs, hidden.clone())
    output = block(*args, **kwargs)
    return output[0] if isinstance(output, tuple) and output else output


def _hidden(inputs: hooks.Inputs) -> Tensor | None:
    args, kwargs = inputs
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


def _with_hidden(inputs: hooks.Inputs, hidden: Any) -> hooks.Inputs:
    args, kwargs = inputs
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
