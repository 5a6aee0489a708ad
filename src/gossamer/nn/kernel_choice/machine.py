"""Which machine this is, and its measured latencies in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gossamer.core.errors import FormatError
from gossamer.core.files import cache_folder, write_whole
from gossamer.core.version import VERSION
from gossamer.nn.kernel_choice.latency import LatencyModel, Predictor, ProductShape
from gossamer.nn.kernel_choice.quick import QuickLatency
from gossamer.nn.kernel_choice.timings import read_timings, store_timings
from gossamer.nn.packed.bitmap import BitmapLinear
from gossamer.ops import _dispatch

_LARGEST = 1 << 20
"""A file of more bytes is not one of ours."""


def machine() -> dict[str, str | int]:
    """What measured latencies and records depend on: processor, instructions, threads and versions."""
    return {
        **_dispatch.processor(),
        "isa": _dispatch.isa(),
        "threads": torch.get_num_threads(),
        "gossamer": VERSION,
        "torch": torch.__version__,
    }


def cache_file(what: str = "latency") -> Path:
    """Where the latencies, or timings, of this machine are kept: one file per machine."""
    key = json.dumps(machine(), sort_keys=True).encode()
    return cache_folder() / f"{what}-{hashlib.sha256(key).hexdigest()[:16]}.json"


def read_latency(path: Path) -> LatencyModel:
    """The latencies in a file; raises FormatError for one that is damaged, OSError for none."""
    if path.stat().st_size > _LARGEST:
        raise FormatError(f"{path} is too large to be a file of latencies")
    try:
        return LatencyModel.from_json(json.loads(path.read_text()))
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is not JSON") from None
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def cached_latency() -> LatencyModel | None:
    """This machine's latencies, None where none were measured or the file is damaged or foreign."""
    try:
        latency = read_latency(cache_file())
    except (OSError, FormatError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return latency if dict(latency.machine) == machine() else None


def known_latency(latency: Predictor | Literal["rule"] | None) -> Predictor | None:
    """What an argument `latency` stands for; None: the rule decides.

    None stands for the latencies that were measured on this machine, and without any for measuring
    what is asked, quickly.
    """
    if latency is None:
        return cached_latency() or measure_here()
    return None if isinstance(latency, str) else latency


def measure_here() -> Predictor | None:
    """What measures when asked, and remembers it between processes; None without kernels."""
    if _dispatch.isa_index() < 0:
        return None
    try:
        path = cache_file("timings")
    except RuntimeError:  # there is no home folder
        return QuickLatency()
    return QuickLatency(found=read_timings(path), store=partial(store_timings, path))


def store_latency(latency: LatencyModel) -> Path:
    """Write them to the cache, whole or not at all; raises OSError where it cannot be written."""
    path, text = cache_file(), json.dumps(latency.to_json(), indent=1)
    write_whole(path, lambda place: place.write_text(text))
    return path


def choose_unpacking(layer: BitmapLinear, latency: Predictor | None) -> None:
    """Set from how many rows on a batch without a prepared form is unpacked; None: by rule."""
    dtype = str(layer.values.dtype).removeprefix("torch.")
    shape = ProductShape(layer.out_features, layer.in_features, layer.density)
    layer.unpack_from = None if latency is None else latency.unpack_from(dtype, shape)


def use_latency(model: nn.Module, latency: Predictor | None) -> None:
    """`choose_unpacking` for every packed layer of a model."""
    for module in model.modules():
        if isinstance(module, BitmapLinear):
            choose_unpacking(module, latency)
