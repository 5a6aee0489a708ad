"""Measuring what every kernel costs on this machine, once: a few layers, densities and rows."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import DisturbedError, UsageError
from gossamer.engine.progress import track
from gossamer.nn import BitmapLinear, PackedConv2d, QuantizedLinear
from gossamer.nn.kernel_choice.decide import convolution_family
from gossamer.nn.kernel_choice.latency import LatencyModel, ProductShape, fit
from gossamer.nn.kernel_choice.machine import machine, store_latency
from gossamer.nn.kernel_choice.timing import burst, copies, random_matrix
from gossamer.ops import _dispatch
from gossamer.ops.conv import sharing
from gossamer.ops.quantized import BITS

SHAPES = ((192, 192), (256, 1024), (1024, 1024), (3072, 768), (1536, 2048))
"""Of the layers (out, in) that are timed, from one that stays in cache to some megabytes."""
CONVOLUTIONS = ((64, 128), (256, 256), (512, 512))
"""Of the 1x1 convolutions (out, channels)."""
WINDOWS = ((64, 64), (128, 128), (256, 256))
"""Of the 3x3 ones (out, channels)."""
STRIDES = ((3, 1), (3, 2), (1, 2))
"""Kernel and stride of convolutions other than plain 1x1 ones."""
ZEROS = ((0.04, 1), (0.1, 1), (0.3, 1), (0.1, 4), (0.3, 4))
"""Density of convolutions, and how many neighbouring outputs keep the same weights."""
DENSITIES = (0.08, 0.3, 0.7)
INTEGERS = (0.2, 0.6)
"""Densities of integers; those of 4 and 8 bits are held dense or by a bitmap."""
INTEGER_ROWS = (1, 128)
ROWS = {"dense": (1, 16, 128), "bitmap-matvec": (1, 8)}
_BATCHES = (16, 128)
PIXELS = (7, 14)
"""A side of the resulting images; the latencies are by all their pixels."""
_DTYPES = (torch.float32, torch.bfloat16)
_BURST, _PATIENCE = 3e-4, 0.06
Point = tuple[str, int, ProductShape, float]


def calibrate_latency(*, store: bool = True, progress: bool = False) -> LatencyModel:
    """Time every kernel on a few layers, and keep the fitted latencies for this user and machine.

    It takes about 20 seconds on two idle cores. `compress` and `load` find what is stored.

    Parameters
    ----------
    store : bool
        Write the file to the user's cache folder.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    LatencyModel
        What was measured.

    Raises
    ------
    DisturbedError
        Where other work shows in the times.
    UsageError
        Where the kernels are not compiled.
    OSError
        Where the cache folder cannot be written.

    Examples
    --------
    >>> import gossamer as gs
    >>> latency = gs.calibrate_latency(store=False)  # doctest: +SKIP
    """
    if _dispatch.isa_index() < 0:
        raise UsageError("latencies are those of compiled kernels, and none run here")
    points: dict[str, dict[int, list[tuple[ProductShape, float]]]] = {}
    total = (len(_DTYPES) + len(BITS)) * len(SHAPES)
    total += len(CONVOLUTIONS) + len(WINDOWS) * len(STRIDES)
    state = torch.random.get_rng_state()
    try:
        with track(total, progress, "measuring kernels") as step, torch.inference_mode():
            for label, found in itertools.chain(_linears(), _integers(), _convolutions()):
                check_quiet()
                for name, rows, shape, seconds in found:
                    points.setdefault(name, {}).setdefault(rows, []).append((shape, seconds))
                step(label)
    finally:
        torch.random.set_rng_state(state)
    terms = {
        name: {rows: fit(measured) for rows, measured in by_rows.items()}
        for name, by_rows in points.items()
    }
    latency = LatencyModel(machine(), terms)
    if store:
        store_latency(latency)
    return latency


def check_quiet() -> None:
    """Raise DisturbedError where all threads together take twice as long as one, thrice in a row.

    A product of 1024 x 1024 is shared in halves; they wait for each other, so work of others on any
    core shows here first, and it would show in every kernel's latency.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return
    layer, x = BitmapLinear.from_matrix(random_matrix(1024, 1024, 0.5)), torch.randn(1, 1024)
    for _ in range(3):
        together = _usual(layer, x)
        try:
            torch.set_num_threads(1)
            alone = _usual(layer, x)
        finally:
            torch.set_num_threads(threads)
        if together <= 2 * alone:
            return
    raise DisturbedError(
        f"other work disturbs the measurement: {threads} threads took {1e6 * together:.0f} us "
        f"where one took {1e6 * alone:.0f}; try again on an idle machine, or set fewer threads"
    )


def _usual(layer: nn.Module, x: Tensor) -> float:
    """Median seconds of a call."""
    turn = itertools.cycle([layer])
    return sorted(burst(turn, x, 1) for _ in range(101))[50]


def _linears() -> Iterator[tuple[str, list[Point]]]:
    for dtype, (out, inputs) in itertools.product(_DTYPES, SHAPES):
        found = list(measure_dense(out, inputs, dtype, ROWS["dense"]))
        for density in DENSITIES:
            found += measure_sparse(out, inputs, density, dtype, ROWS["bitmap-matvec"], _BATCHES)
        for high in (4, 16):
            found += measure_blocks(out, inputs, 0.3, high, dtype, _BATCHES)
            found += measure_blocks(out, inputs, 0.08, high, dtype, _BATCHES)
        yield f"{out}x{inputs} {_name(dtype)}", found


def measure_dense(
    out: int, inputs: int, dtype: torch.dtype, rows: tuple[int, ...]
) -> Iterator[Point]:
    """torch's own linear layer, in its dtype."""
    layers = copies(nn.Linear(inputs, out, bias=False).to(dtype))
    for count in rows:
        x = torch.randn(count, inputs).to(dtype)
        yield f"dense {_name(dtype)}", count, ProductShape(out, inputs), _seconds(layers, x)


def measure_sparse(
    out: int,
    inputs: int,
    density: float,
    dtype: torch.dtype,
    few: tuple[int, ...],
    many: tuple[int, ...],
) -> Iterator[Point]:
    """Every kernel for unstructured zeros: up to 8 rows, and more in the three ways that serve."""
    layer = BitmapLinear.from_matrix(random_matrix(out, inputs, density).to(dtype))
    shape = ProductShape(out, inputs, layer.density)
    layers = copies(layer)
    for rows in few:
        x = torch.randn(rows, inputs).to(dtype)
        yield f"bitmap-matvec {_name(dtype)}", rows, shape, _seconds(layers, x)
    for kernel, first in (("bitmap-unpack", 0), ("bitmap-spmm", 1 << 62)):
        for each in layers:
            each.unpack_from = first
        for rows in many:
            x = torch.randn(rows, inputs).to(dtype)
            yield f"{kernel} {_name(dtype)}", rows, shape, _seconds(layers, x)
    layer.prepare_columns()
    layers = copies(layer)
    for rows in few:
        x = torch.randn(rows, inputs).to(dtype)
        yield f"csr-matvec {_name(dtype)}", rows, shape, _seconds(layers, x)
    layer.prepare_large_batches()
    layers = copies(layer)
    for rows in many:
        x = torch.randn(rows, inputs).to(dtype)
        yield f"sell-spmm {_name(dtype)}", rows, shape, _seconds(layers, x)


def measure_blocks(
    out: int, inputs: int, density: float, high: int, dtype: torch.dtype, rows: tuple[int, ...]
) -> Iterator[Point]:
    """Blocks of `high` rows and one column."""
    matrix = random_matrix(out, inputs, density, high).to(dtype)
    layer = BitmapLinear.from_matrix(matrix, pattern=f"block:{high}x1")
    layer.prepare_large_batches()
    assert "block" in str(layer.batch_kernel)
    layers = copies(layer)
    for count in rows:
        x = torch.randn(count, inputs).to(dtype)
        shape = ProductShape(out, inputs, layer.density, high)
        yield f"block-spmm {_name(dtype)}", count, shape, _seconds(layers, x)


def _integers() -> Iterator[tuple[str, list[Point]]]:
    for bits, (out, inputs) in itertools.product(BITS, SHAPES):
        found = list(measure_integers(out, inputs, bits, INTEGERS, INTEGER_ROWS))
        yield f"{out}x{inputs} int{bits}", found


def measure_integers(
    out: int, inputs: int, bits: int, densities: tuple[float, ...], rows: tuple[int, ...]
) -> Iterator[Point]:
    """Integers held sparse at every density, and dense."""
    for density in densities:
        layer = QuantizedLinear.from_matrix(random_matrix(out, inputs, density), bits=bits)
        if layer.bitmap is None:
            continue
        layers, shape = copies(layer), ProductShape(out, inputs, layer.density)
        for count in rows:
            x = torch.randn(count, inputs)
            yield f"bitmap-matvec int{bits}", count, shape, _seconds(layers, x)
    layer.densify()
    layers = copies(layer)
    for count in rows:
        x = torch.randn(count, inputs)
        yield f"dense int{bits}", count, ProductShape(out, inputs), _seconds(layers, x)


def _convolutions() -> Iterator[tuple[str, list[Point]]]:
    cases = [(shape, (1, 1)) for shape in CONVOLUTIONS]
    cases += list(itertools.product(WINDOWS, STRIDES))
    for (out, channels), (kernel, stride) in cases:
        found: list[Point] = []
        for side in PIXELS:
            found += measure_convolution(out, channels, ZEROS, side, kernel, stride)
        yield f"{kernel}x{kernel} convolution {out}x{channels}", found


def measure_convolution(
    out: int,
    channels: int,
    zeros: tuple[tuple[float, int], ...],
    side: int,
    kernel: int = 1,
    stride: int = 1,
) -> Iterator[Point]:
    """torch's convolution, in the faster of its two layouts, and ours, on one float32 image.

    side: of the result. Padding is half the kernel.
    """
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    family = convolution_family(conv.kernel_size, conv.stride)
    x = torch.randn(1, channels, side * stride, side * stride)
    turned: Any = copy.deepcopy(conv).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    taken = min(
        _seconds(copies(conv), x),
        _seconds(copies(turned), x.contiguous(memory_format=torch.channels_last)),
    )
    inputs, pixels = kernel * kernel * channels, side * side
    yield f"dense-conv{family} float32", pixels, ProductShape(out, inputs), taken
    for density, high in zeros:
        matrix = random_matrix(out, inputs, density, high)
        layer = PackedConv2d.from_conv(conv, BitmapLinear.from_matrix(matrix))
        shape, name = ProductShape(out, inputs, layer.density), layer.kernel.partition("/")[0]
        if name == "tiled-conv":
            shape = replace(shape, high=sharing(matrix))
        yield f"{name}{family} float32", pixels, shape, _seconds(copies(layer), x)


def _seconds(layers: list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """The least of many bursts' mean time of a call: what else runs can only add to it.

    Ends once the least was met three times (twice by long calls), within 5%; on a busy machine
    after 60 ms and three calls.
    """
    turn = itertools.cycle(layers)
    once = min(burst(turn, x, 1) for _ in range(2))
    count = max(1, min(20, int(_BURST / once)))
    least, met, start = once, 0, time.perf_counter()
    enough = 2 if once > 5e-3 else 3
    while met < enough and time.perf_counter() - start < _PATIENCE + 3 * once:
        taken = burst(turn, x, count)
        met = 1 if taken < 0.95 * least else met + (taken < 1.05 * least)
        least = min(least, taken)
    return least


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
