"""Statistics of the hidden state on both sides of each block of the dense model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.stats import AngularDistance, BlockStats
from gossamer.engine import hooks
from gossamer.engine.calls import Inputs
from gossamer.engine.prune.calibrate import Calibrator
from gossamer.engine.prune.padding import Padding, real_rows
from gossamer.engine.prune.replay import first_of, hidden_of


def gather_angles(
    calibrator: Calibrator, blocks: Sequence[tuple[str, nn.Module]]
) -> list[BlockStats]:
    """How far each block turns the hidden state, without padding; one pass over the data.

    Call it inside `hooks.evaluating(model)`. A hidden state is held only while its block runs.
    Raises UsageError, naming the block, where what comes out is not a hidden state of the shape
    that went in; NonFiniteError for NaN.
    """
    accumulator = AngularDistance()
    states = [accumulator.init() for _ in blocks]
    held: dict[int, Tensor | None] = {}
    padding: Padding | None = None

    def before(index: int, inputs: Inputs) -> None:
        hidden = hidden_of(inputs)
        held[index] = None if hidden is None else hidden.detach().clone()  # blocks work in place

    def after(index: int, output: object) -> None:
        name, hidden, new = blocks[index][0], held.pop(index), first_of(output)
        if hidden is None or not isinstance(new, Tensor) or new.shape != hidden.shape:
            raise UsageError(
                f"{name}: gives no hidden state of the shape that it is given, so its influence is "
                "not defined; choose another allocation"
            )
        states[index] = accumulator.update(
            states[index], _rows(name, hidden, padding), _rows(name, new.detach(), padding)
        )

    for index in range(len(calibrator.batches)):
        padding = calibrator.paddings[index]
        with calibrator.running(), hooks.watch_blocks([x for _, x in blocks], before, after):
            calibrator.call(index)
        calibrator.tick(f"batch {index + 1} of {len(calibrator.batches)}")
    return [accumulator.finalize(s, name) for (name, _), s in zip(blocks, states, strict=True)]


def _rows(name: str, hidden: Tensor, padding: Padding | None) -> Tensor:
    """The tokens (count, width) that are real; all of them where the mask does not fit."""
    if not hidden.is_floating_point() or not bool(torch.isfinite(hidden).all()):
        raise NonFiniteError(f"{name}: its hidden states are not finite numbers; check the data")
    mask = padding.mask_of(name, hidden.shape) if padding else None
    rows = None if mask is None else real_rows(hidden, mask)
    return hidden.reshape(-1, hidden.shape[-1]) if rows is None else rows
