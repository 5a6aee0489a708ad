"""Short timings of kernels in the user's cache folder, so that a machine is timed once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from gossamer.core.files import write_whole
from gossamer.nn.kernel_choice.latency import ProductShape

Key = tuple[str, str, int, ProductShape]
"""Kernels that are timed together, dtype of the weights, batch size, and the matrix."""
_LARGEST = 1 << 20
"""A file of more bytes is not one of ours."""


def read_timings(path: Path) -> dict[Key, dict[str, float]]:
    """Seconds by kernel that an earlier process kept; none where the file is absent or damaged."""
    try:
        if path.stat().st_size > _LARGEST:
            return {}
        return dict(_entry(each) for each in json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def store_timings(path: Path, found: Mapping[Key, Mapping[str, float]]) -> None:
    """Keep them, whole or not at all; a folder that cannot be written to keeps nothing."""
    entries = [
        {"kind": kind, "dtype": dtype, "rows": rows, **vars(shape), "seconds": dict(seconds)}
        for (kind, dtype, rows, shape), seconds in found.items()
    ]
    with contextlib.suppress(OSError):
        write_whole(path, lambda place: place.write_text(json.dumps(entries)))


def _entry(each: dict[str, object]) -> tuple[Key, dict[str, float]]:
    """One timing; raises ValueError, TypeError or KeyError for anything else."""
    whole = [each[name] for name in ("rows", "out", "inputs")]
    numbers, seconds = [each["density"], each["high"]], each["seconds"]
    if not isinstance(seconds, dict) or not all(isinstance(name, str) for name in seconds):
        raise TypeError("seconds is an object")
    if not all(type(n) is int and 0 < n < 1 << 31 for n in whole):
        raise ValueError("sizes are whole numbers")
    if not all(type(n) in (int, float) and 0 < n < 1e9 for n in [*numbers, *seconds.values()]):
        raise ValueError("numbers are positive")
    rows, out, inputs = (int(str(n)) for n in whole)
    shape = ProductShape(out, inputs, float(str(numbers[0])), float(str(numbers[1])))
    return (str(each["kind"]), str(each["dtype"]), rows, shape), seconds
