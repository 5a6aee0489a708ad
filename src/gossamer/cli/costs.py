"""Measured costs for the commands that choose kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gossamer.cli.output import note
from gossamer.core.errors import UsageError
from gossamer.engine.serve.measure_latency import calibrate_costs
from gossamer.nn.kernel_choice.latency import Costs
from gossamer.nn.kernel_choice.machine import read_costs, store_costs


def measure_costs() -> Costs:
    """Measure with progress and keep the result; a cache that cannot be written costs a line."""
    note("measuring what every kernel costs on this machine, once, about 20 seconds")
    costs = calibrate_costs(store=False, progress=True)
    try:
        store_costs(costs)
    except OSError as error:
        note(f"the costs cannot be kept: {error}")
    return costs


def costs_named(name: str) -> Costs | Literal["rule"] | None:
    """What `--costs` says, as the argument of `gossamer.compress`: None stands for auto.

    Raises UsageError for a file that does not exist, FormatError for one that is damaged.
    """
    if name == "rule":
        return "rule"
    if name != "auto":
        if not Path(name).is_file():
            raise UsageError(f"--costs is auto, rule or a file, not {name!r}")
        return read_costs(Path(name))
    return None
