"""Measured latencies for the commands that choose kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gossamer.cli.output import note
from gossamer.core.errors import UsageError
from gossamer.engine.serve.measure_latency import calibrate_latency
from gossamer.nn.kernel_choice.latency import LatencyModel
from gossamer.nn.kernel_choice.machine import read_latency, store_latency


def measure_latency() -> LatencyModel:
    """Measure with progress and keep the result; a cache that cannot be written costs a line."""
    note("measuring how fast every kernel is on this machine, once, about 20 seconds")
    latency = calibrate_latency(store=False, progress=True)
    try:
        store_latency(latency)
    except OSError as error:
        note(f"the latencies cannot be kept: {error}")
    return latency


def latency_named(name: str) -> LatencyModel | Literal["rule"] | None:
    """What `--latency` says, as the argument of `gossamer.compress`: None stands for auto.

    Raises UsageError for a file that does not exist, FormatError for one that is damaged.
    """
    if name == "rule":
        return "rule"
    if name != "auto":
        if not Path(name).is_file():
            raise UsageError(f"--latency is auto, rule or a file, not {name!r}")
        return read_latency(Path(name))
    return None
