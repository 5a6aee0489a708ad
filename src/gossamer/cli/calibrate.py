"""gossamer calibrate."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.cli.latency import measure_latency
from gossamer.cli.output import print_json, print_table
from gossamer.nn.kernel_choice.decide import BATCH, PIXELS
from gossamer.nn.kernel_choice.latency import LatencyModel, ProductShape
from gossamer.nn.kernel_choice.machine import cache_file

_SHOWN = ProductShape(4096, 4096), ProductShape(4096, 4096, 0.5)


@dataclass
class Calibrate:
    """Measure how fast every kernel is on this machine, so that compress and load can choose.

    Example: gossamer calibrate
    """

    json: bool = False
    """print the latencies as one JSON object"""

    def run(self) -> None:
        """Measure, keep in the user's cache folder, print."""
        latency = measure_latency()
        if self.json:
            print_json(latency.to_json())
            return
        title = "predicted for 4096 x 4096 at density 0.5 (dense: 1), milliseconds"
        header = ("kernel", "dtype", "1 row", f"{BATCH} rows", f"{PIXELS} pixels")
        print_table(title, header, _rows(latency))
        print(f"kept in {cache_file()}")


def _rows(latency: LatencyModel) -> list[tuple[str, ...]]:
    """What decisions ask for: layers at one row and a batch, convolutions at some pixels."""
    rows = []
    for name in sorted(latency.terms):
        kernel, dtype = name.rsplit(" ", 1)
        shape = _SHOWN[0] if kernel.startswith("dense") else _SHOWN[1]
        measured = latency.terms[name]
        cells = []
        for count in (1, BATCH, PIXELS):
            served = min(measured) <= count and (count <= 8 or max(measured) > 8)
            served = served and ("conv" in kernel) == (count == PIXELS)
            seconds = latency.seconds(kernel, dtype, count, shape)
            cells.append(f"{1e3 * seconds:.3g}" if served and seconds is not None else "-")
        rows.append((kernel, dtype, *cells))
    return rows
