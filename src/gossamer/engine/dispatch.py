"""Choosing what serves a layer by measured costs: the dense product or one of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gossamer.core.costs import Costs, Work
from gossamer.core.errors import PatternError
from gossamer.core.pattern import Block, parse_pattern
from gossamer.core.result import LayerRecord
from gossamer.engine.decoder import FAMILIES
from gossamer.ops.blocks import HEIGHTS

BATCH = 128
"""Rows of input for which layers of a model that sees batches are chosen."""
PIXELS = 196
"""Pixels for which a convolution is chosen: 14 x 14, the middle of a usual network."""


@dataclass(frozen=True)
class Decision:
    """The fastest, `dense` or a kernel, and the seconds predicted of each for `rows` of input."""

    chosen: str
    predicted: dict[str, float]
    rows: int
    unit: str = "row"

    def __str__(self) -> str:
        """`bitmap-matvec 0.22 ms, dense 0.41 ms for 1 row`: the fastest first."""
        order = sorted(self.predicted.items(), key=lambda item: item[1])
        times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in order)
        return f"predicted {times} for {self.rows} {self.unit}{'s' if self.rows > 1 else ''}"


def decide(
    root: nn.Module, module: nn.Module, record: LayerRecord, costs: Costs, batches: bool
) -> Decision | None:
    """The fastest for one linear layer or 1x1 convolution; None where it was not measured.

    Models that generate text are judged by one row; where the compiled loop serves them, without
    the cost of calls, which it does not make. Others by `BATCH` rows, convolutions by `PIXELS`.
    """
    rows, calls, unit = (BATCH, True, "row") if batches else (1, True, "row")
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        return None
    if isinstance(module, nn.Conv2d):
        rows, unit = PIXELS, "pixel"
        names = ["dense-conv", "sparse-conv"]
    elif batches:
        names = ["dense", "sell-spmm", "bitmap-unpack", "bitmap-spmm"]
    else:
        names = ["dense", "bitmap-matvec"]
        calls = type(root).__name__ not in FAMILIES
    weight = module.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    out, inputs = record.shape[0], record.shape[1]
    high = block_height(record.pattern, out, inputs)
    if batches and high and not isinstance(module, nn.Conv2d):
        names = ["dense", "block-spmm", "bitmap-unpack", "bitmap-spmm"]
    predicted = {}
    for name in names:
        work = Work(out, inputs, record.density, high if name == "block-spmm" else 1)
        seconds = costs.seconds(name, dtype, rows, work, calls)
        if seconds is not None:
            predicted[name.replace("dense-conv", "dense")] = seconds
    if "dense" not in predicted or len(predicted) < 2:
        return None
    chosen = min(predicted, key=lambda name: predicted[name])
    return Decision(chosen, predicted, rows, unit)


def block_height(pattern: str, out: int, inputs: int) -> int:
    """Rows of a block where the pattern is one of whole blocks that a kernel serves, else 0."""
    try:
        parsed = parse_pattern(pattern)
    except PatternError:
        return 0
    if not isinstance(parsed, Block) or out % parsed.rows or inputs % parsed.cols:
        return 0
    return parsed.rows if parsed.rows in HEIGHTS else 0
