"""gossamer calibrate."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.cli.costs import measure_costs
from gossamer.cli.output import print_json, print_table
from gossamer.nn.kernel_choice.decide import BATCH, PIXELS
from gossamer.nn.kernel_choice.latency import Costs, Work
from gossamer.nn.kernel_choice.machine import cache_file

_SHOWN = Work(4096, 4096), Work(4096, 4096, 0.5)


@dataclass
class Calibrate:
    """Measure what every kernel costs on this machine, so that compress and load can choose.

    Example: gossamer calibrate
    """

    json: bool = False
    """print the costs as one JSON object"""

    def run(self) -> None:
        """Measure, keep in the user's cache folder, print."""
        costs = measure_costs()
        if self.json:
            print_json(costs.to_json())
            return
        title = "predicted for 4096 x 4096 at density 0.5 (dense: 1), milliseconds"
        header = ("kernel", "dtype", "1 row", f"{BATCH} rows", f"{PIXELS} pixels")
        print_table(title, header, _rows(costs))
        print(f"kept in {cache_file()}")


def _rows(costs: Costs) -> list[tuple[str, ...]]:
    """What decisions ask for: layers at one row and a batch, convolutions at some pixels."""
    rows = []
    for name in sorted(costs.terms):
        kernel, dtype = name.rsplit(" ", 1)
        work = _SHOWN[0] if kernel.startswith("dense") else _SHOWN[1]
        measured = costs.terms[name]
        cells = []
        for count in (1, BATCH, PIXELS):
            served = min(measured) <= count and (count <= 8 or max(measured) > 8)
            served = served and ("conv" in kernel) == (count == PIXELS)
            seconds = costs.seconds(kernel, dtype, count, work)
            cells.append(f"{1e3 * seconds:.3g}" if served and seconds is not None else "-")
        rows.append((kernel, dtype, *cells))
    return rows
