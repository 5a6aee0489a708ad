"""Calibration: input statistics of one unit's weights at a time, behind already pruned ones.

The flow is that of SparseGPT and Wanda: keep what the first block is given, and for every block
run it to gather statistics, prune it, run it again, and feed the outputs to the next. Every block
gets the arguments that the model itself gave it. A model whose blocks cannot be run so (found out
by a probe, not assumed) is run whole, once per unit: slower, with the same statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, NonFiniteError, UsageError
from gossamer.core.matrix import Weight, inputs_of, windows_of
from gossamer.core.stats import (
    ColumnNorm,
    ColumnSum,
    ColumnVariance,
    Hessian,
    LayerStats,
    together,
)
from gossamer.engine import hooks
from gossamer.engine.data import Batch, call, rows_of
from gossamer.engine.prune.padding import Padding, is_two_sided, padding_of, real_rows
from gossamer.engine.prune.products import observe_products, unfused
from gossamer.engine.prune.replay import Trace, replays, run_block
from gossamer.ops.statistics import add_gram

STATISTICS: dict[str, Any] = {
    "norm": ColumnNorm(),
    "hessian": Hessian(add=add_gram),
    "sum": ColumnSum(),
    "variance": ColumnVariance(),
}
"""What calibration can gather; a method that needs anything else cannot be served."""


class Gatherer:
    """Accumulates statistics of several weights from their inputs, in float32.

    needs: of `STATISTICS`. padding: of the batch that runs. sequences: how many inputs the model
    was given. served: ids of the mixtures of experts that see real tokens alone. unmasked: names of
    the weights whose padding could not be told.
    """

    def __init__(self, weights: Mapping[str, Weight], needs: Sequence[str]) -> None:
        self.weights = dict(weights)
        self.padding: Padding | None = None
        self.served: set[int] = set()
        self.unmasked: set[str] = set()
        self.sequences = 0
        self._accumulators = {need: STATISTICS[need] for need in needs}
        self._states: dict[tuple[str, str], Any] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add one input of a layer; raises NonFiniteError naming the layer."""
        self._update(name, self._rows_of(name, x))

    def add_product(self, name: str, rows: Tensor, _: bool = False) -> None:
        """Add rows (count, in) that a weight multiplies; raises NonFiniteError naming it."""
        weight = self.weights[name]
        mask = self.padding.mask_of(name) if self.padding else None
        if isinstance(weight.part, int):  # an expert: padding never reached it, or cannot be told
            if mask is not None and id(weight.module) not in self.served:
                self.unmasked.add(name)
        elif mask is not None and len(rows) == mask.numel():
            order = mask.t() if _time_first(weight.module) else mask
            rows = rows[order.reshape(-1).to(rows.device)]
        elif mask is not None:
            self.unmasked.add(name)
        self._update(name, rows)

    def finish(self) -> dict[str, LayerStats]:
        """The statistics by name, of the weights that saw any input."""
        done = {}
        for name in self.weights:
            states = {need: self._states.pop((name, need), None) for need in self._accumulators}
            parts = [
                self._accumulators[need].finalize(state, name)
                for need, state in states.items()
                if state is not None
            ]
            if parts and parts[0].count:
                done[name] = replace(together(parts), sequences=self.sequences)
        return done

    def _rows_of(self, name: str, x: Tensor) -> Tensor:
        """What a layer's weight multiplies of its input x, without padding."""
        module = self.weights[name].module
        mask = self.padding.mask_of(name, x.shape) if self.padding else None
        if mask is None or (x.dim() > 3 and isinstance(module, (nn.Conv2d, nn.Conv3d))):
            return inputs_of(module, x)  # images have no tokens
        if isinstance(module, nn.Conv1d) and x.dim() == 3 and x[:, 0].shape == mask.shape:
            taps = windows_of(module, mask[:, None].to(x), "zeros")  # (batch, 1, places, taps)
            return inputs_of(module, x)[taps.any(dim=3).reshape(-1)]
        rows = None if isinstance(module, nn.Conv1d) else real_rows(x.detach(), mask)
        if rows is None:
            self.unmasked.add(name)
            return inputs_of(module, x)
        return rows

    def check(self, name: str, x: Tensor) -> None:
        """Raise, as `add` would, for an input that gives no statistics."""
        _check_rows(name, self._rows_of(name, x) if self.padding else x)

    def _update(self, name: str, rows: Tensor) -> None:
        _check_rows(name, rows)
        rows = rows.float()
        for need, accumulator in self._accumulators.items():
            state = self._states.get((name, need))
            if state is None:
                state = accumulator.init(rows.shape[-1], rows.device)
            self._states[name, need] = accumulator.update(state, rows)


def _check_rows(name: str, rows: Tensor) -> None:
    if not rows.is_floating_point():
        raise UsageError(f"{name}: its inputs are {rows.dtype}, which give no statistics")
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError(
            f"{name}: NaN or inf among its calibration inputs; check the data, or run the model "
            "in float32"
        )


def _time_first(module: nn.Module) -> bool:
    """Whether torch computes the module's products with tokens outside of the batch."""
    attention = type(module).__name__ == "NonDynamicallyQuantizableLinear"  # its out_proj
    return attention or isinstance(module, (nn.MultiheadAttention, nn.RNNBase))


@dataclass
class Recording:
    """What one pass over the data shows of a model as it is.

    order: the place of each weight in the first use. calls, products: how often each layer was
    called, and each weight was seen in a product. flipped: how weights were seen to lie. traces: of
    the blocks, by batch.
    """

    order: dict[str, int] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    flipped: dict[str, set[bool]] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)


class Calibrator:
    """Gathers statistics unit by unit, in order; call it inside `hooks.evaluating(model)`.

    blocks: what `find_blocks` gave. `order` maps a weight's name to its place in the calls of the
    model; one that the data never reached is absent. `flipped` holds how each was seen to lie, as
    (in, out) or not. `chained` says how blocks are run. tick: called with a few words as work goes
    on.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        weights: Mapping[str, Weight],
        batches: Sequence[Batch],
        tick: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.batches, self.tick = model, batches, tick
        self.blocks = [block for _, block in blocks]
        two_sided = is_two_sided(name for name, _ in model.named_modules())
        config: Any = getattr(model, "config", None)
        if hasattr(config, "is_encoder_decoder"):  # no: as in Funnel, both read the same tokens
            two_sided = two_sided and bool(config.is_encoder_decoder)
        self.paddings = [padding_of(batch, two_sided) for batch in batches]
        self._mixtures = {
            id(weight.module): name for name, weight in weights.items()
            if isinstance(weight.part, int)
        }  # fmt: skip
        self._modules = list({id(x.module): x.module for x in weights.values()}.values())
        self._padding: Padding | None = None
        self._position = 0
        self.unmasked: set[str] = set()
        seen, self.chained = probe(self, weights)
        self.order = seen.order
        self.flipped = seen.flipped
        self._by_product = {
            name for name, weight in weights.items()
            if not weight.reads_input or seen.products[name] > seen.calls[name]
        }  # fmt: skip
        self._traces = seen.traces if self.chained else []
        self._hidden = [trace.hidden[0] for trace in self._traces]
        self._stale = False

    def changed_outside(self) -> None:
        """A weight outside of the blocks was pruned, so what the first block is given changed."""
        self._stale = True

    def gather(
        self, weights: Mapping[str, Weight], block: int | None, needs: Sequence[str]
    ) -> dict[str, LayerStats]:
        """Statistics of one unit's weights, of those that the data reaches.

        A chained block must not come before an earlier one.
        """
        gatherer = Gatherer(weights, needs)
        chained = block is not None and self.chained
        if chained:  # reach the block before watching: getting there runs the model too
            self._advance_to(block)
        inputs = {n: w.module for n, w in weights.items() if n not in self._by_product}
        products = {n: w for n, w in weights.items() if n in self._by_product}
        with (
            self.running() as gatherer.served,
            hooks.observe_inputs(inputs, gatherer.add),
            observe_products(products, gatherer.add_product),
        ):
            for index in range(len(self.batches)):
                gatherer.padding = self.paddings[index]
                gatherer.sequences += rows_of(self.batches[index])
                if chained:
                    self._run(index)
                else:
                    self.call(index)
                self.tick(f"batch {index + 1} of {len(self.batches)}")
        self.unmasked |= gatherer.unmasked
        return gatherer.finish()

    @contextmanager
    def running(self) -> Iterator[set[int]]:
        """What holds around every run: nothing fused, and mixtures that see no padding."""
        mixtures = [module for module in self._modules if id(module) in self._mixtures]
        with unfused(self._modules), hooks.without_padding(mixtures, self._real) as served:
            yield served

    def call(self, index: int) -> None:
        """Run the model on a copy of one batch: a model that works in place would change it."""
        self._padding = self.paddings[index]
        batch = self.batches[index]
        copy: Batch
        if isinstance(batch, Tensor):
            copy = batch.clone()
        else:
            copy = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        try:
            call(self.model, copy)
        except GossamerError:
            raise
        except Exception as error:
            raise UsageError(
                f"the model cannot be run on calibration batch {index}: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _traced(self, index: int) -> Trace:
        trace = Trace(len(self.blocks), keep=False)
        with self.running(), hooks.watch_blocks(self.blocks, trace.before, trace.after):
            self.call(index)
        trace.close()
        return trace

    def _real(self, module: nn.Module) -> Tensor | None:
        return self._padding.mask_of(self._mixtures[id(module)]) if self._padding else None

    def _run(self, index: int) -> Any:
        """Run the present block on one batch."""
        self._padding = self.paddings[index]
        arguments = self._traces[index].arguments[self._position]
        return run_block(self.blocks[self._position], arguments, self._hidden[index])

    def _advance_to(self, block: int | None) -> None:
        if self._stale and not self._position:
            self._traces = [self._traced(index) for index in range(len(self.batches))]
            self._hidden = [trace.hidden[0] for trace in self._traces]
            self._stale = False
        while self._position < (block or 0):
            with self.running():
                for index in range(len(self.batches)):
                    self._hidden[index] = self._run(index)
            self._position += 1


def probe(calibrator: Calibrator, weights: Mapping[str, Weight]) -> tuple[Recording, bool]:
    """One pass over the data: what it reaches, how, and whether blocks form a chain.

    They do when in every batch each is called once, in order, with the output of the one before;
    and, tried on every shape of batch that occurs, running each on its own gives the same.
    """
    seen, gatherer = Recording(), Gatherer(weights, ())
    chained, shapes = bool(calibrator.blocks), set()
    layers = {name: weight.module for name, weight in weights.items() if weight.reads_input}
    matrices = {n: w for n, w in weights.items() if w.tensor.dim() == 2}

    def called(name: str, x: Tensor) -> None:
        if x.numel():
            seen.order.setdefault(name, len(seen.order))
            seen.calls[name] += 1
            gatherer.check(name, x)

    def multiplied(name: str, rows: Tensor, flipped: bool) -> None:
        seen.order.setdefault(name, len(seen.order))
        seen.products[name] += 1
        seen.flipped.setdefault(name, set()).add(flipped)

    for index, batch in enumerate(calibrator.batches):
        gatherer.padding = calibrator.paddings[index]
        new = (shape := _shape_of(batch)) not in shapes
        shapes.add(shape)
        trace = Trace(len(calibrator.blocks) if chained else 0, keep=new)
        with calibrator.running() as gatherer.served:
            with (
                hooks.watch_blocks(calibrator.blocks, trace.before, trace.after),
                hooks.observe_inputs(layers, called),
                observe_products(matrices, multiplied),
            ):
                calibrator.call(index)
            trace.close()
            chained = chained and trace.whole
            if chained and new:
                chained = replays(calibrator.blocks, trace, lambda: calibrator.call(index))  # noqa: B023
                del trace.hidden[1:]
        seen.traces.append(trace)
        if not chained:
            seen.traces.clear()
        calibrator.tick(f"batch {index + 1} of {len(calibrator.batches)}")
    return seen, chained


def _shape_of(batch: Batch) -> object:
    if isinstance(batch, Tensor):
        return batch.shape
    return tuple((k, v.shape if isinstance(v, Tensor) else repr(v)) for k, v in batch.items())
