"""Latencies measured on the spot, for machines on which nobody called `calibrate_latency`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gossamer.nn.kernel_choice.latency import ProductShape
from gossamer.nn.kernel_choice.timing import CALM, calm, copies, in_turns, random_matrix
from gossamer.nn.kernel_choice.timings import Key
from gossamer.nn.packed.bitmap import BitmapLinear
from gossamer.nn.packed.conv import PackedConv2d
from gossamer.nn.packed.quantized import QuantizedLinear
from gossamer.ops.bitmap import WIDEST
from gossamer.ops.bitmap.native import MATVEC_ROWS

_LARGEST = 1 << 21
"""Of a layer with more weights only some rows are timed: the time grows with them."""
_PATIENCE = 0.012
_COLD, _WARM = 64 << 20, 8 << 20
"""Bytes of the copies that take turns: batches are bound by arithmetic, single rows by memory."""
_TINY = ProductShape(16, 64, 0.5)
"""What such a layer takes is taken for the cost of a call."""


@dataclass
class QuickLatency:
    """Seconds of the dense product and of every kernel, timed in turns when first asked for.

    Random weights of the shape, density and dtype in question are timed, some ten milliseconds for
    each kernel, and remembered. After `budget` seconds in all, times of the nearest shape that was
    measured count, scaled by the weights; where there is none, nothing is known and the rule
    decides. `note` says where the machine was not calm; where it was, `store` keeps what was found.
    """

    budget: float = 3.0
    spent: float = 0.0
    found: dict[Key, dict[str, float]] = field(default_factory=dict)
    store: Callable[[Mapping[Key, Mapping[str, float]]], None] | None = None
    word: str = "timed here"
    note: str = ""

    def seconds(
        self, kernel: str, dtype: str, rows: int, shape: ProductShape, calls: bool = True
    ) -> float | None:
        """Time of one product, as `LatencyModel.seconds`."""
        times = self._times(kernel, dtype, rows, shape)
        if calls or kernel not in times:
            return times.get(kernel)
        empty = self._times(kernel, dtype, rows, _TINY)
        if any(empty.get(name, 0.0) >= taken for name, taken in times.items()):
            return None  # others used the machine while calls were timed: the rule decides
        return times[kernel] - empty.get(kernel, 0.0)

    def unpack_from(self, dtype: str, shape: ProductShape) -> int | None:
        """As `LatencyModel.unpack_from`, of two numbers of rows."""
        start = 1 << 62
        for rows in (128, 16):
            times = self._times("bitmap-spmm", dtype, rows, shape)
            if not {"bitmap-unpack", "bitmap-spmm"} <= times.keys():
                return None
            if times["bitmap-unpack"] > times["bitmap-spmm"]:
                break
            start = rows
        return start

    def _times(self, kernel: str, dtype: str, rows: int, shape: ProductShape) -> dict[str, float]:
        kind = _kind(kernel, shape)
        high = shape.high if kernel == "block-spmm" else 1
        density = max(0.02, round(20 * shape.density) / 20)
        key = (kind, dtype, rows, replace(shape, density=density, high=round(high)))
        if key not in self.found:
            if self.spent >= self.budget:
                return self._nearest(key)
            start = time.perf_counter()
            if not self.spent and calm() < CALM:
                self.note = " (on a busy machine)"
            self.found[key] = _measure(*key)
            self.spent += time.perf_counter() - start
            if self.store is not None and not self.note:
                self.store(self.found)
        return self.found[key]

    def _nearest(self, key: Key) -> dict[str, float]:
        """Of the same kind, dtype and rows: the density first, then the size."""
        wanted, size = key[3], key[3].out * key[3].inputs
        same = [k for k in self.found if k[:3] == key[:3] and k[3].high == wanted.high]
        same = [k for k in same if k[3] != replace(_TINY, density=k[3].density)] or same
        if not same:
            return {}

        def far(k: Key) -> tuple[float, float]:
            return abs(k[3].density - wanted.density), abs(k[3].out * k[3].inputs - size)

        near = min(same, key=far)
        scale = size / (near[3].out * near[3].inputs)
        return {name: scale * taken for name, taken in self.found[near].items()}


def _kind(kernel: str, shape: ProductShape) -> str:
    """Kernels that are timed together."""
    name, conv, family = kernel.partition("conv")
    if not conv:
        return "blocks" if kernel == "block-spmm" else "linear"
    return ("tiled-conv" if name == "tiled-" or shape.high > 1 else "conv") + family


def _measure(kind: str, dtype: str, rows: int, shape: ProductShape) -> dict[str, float]:
    """Seconds of every kernel of one kind."""
    share = min(1.0, _LARGEST / (shape.out * shape.inputs))
    part = replace(shape, out=max(1, int(shape.out * share)))
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        if "conv" in kind:
            layers, x = _convolutions(kind, rows, part)
        else:
            layers, x = _linears(kind, dtype, rows, part)
        cold = _COLD if rows <= MATVEC_ROWS else _WARM
        times = in_turns({n: copies(each, cold) for n, each in layers.items()}, x, _PATIENCE)
    return {name: taken * shape.out / part.out for name, taken in times.items()}


def _linears(
    kind: str, dtype: str, rows: int, shape: ProductShape
) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """torch's layer and ours, with an input."""
    x = torch.randn(rows, shape.inputs)
    high = int(shape.high) if kind == "blocks" else 1
    matrix = random_matrix(shape.out, shape.inputs, shape.density, high)
    if dtype.startswith("int"):
        sparse = QuantizedLinear.from_matrix(matrix, bits=int(dtype[3:]))
        dense = QuantizedLinear.from_matrix(matrix, bits=int(dtype[3:]))
        dense.densify()
        return {"bitmap-matvec": sparse, "dense": dense}, x
    own = getattr(torch, dtype)
    plain: Any = nn.Linear(shape.inputs, shape.out, bias=False, dtype=own)
    layers: dict[str, nn.Module] = {"dense": plain}
    pattern = f"block:{high}x1" if kind == "blocks" else ""

    def ours() -> BitmapLinear:
        return BitmapLinear.from_matrix(matrix.to(own), pattern=pattern)

    if rows <= MATVEC_ROWS:
        layers["bitmap-matvec"] = ours()
        if shape.inputs <= WIDEST:
            layers["csr-matvec"] = columns = ours()
            columns.prepare_columns()
        return layers, x.to(own)
    for name, start in (("bitmap-unpack", 0), ("bitmap-spmm", 1 << 62)):
        layers[name] = each = ours()
        each.unpack_from = start
    form = "block-spmm" if kind == "blocks" else "sell-spmm"
    layers[form] = prepared = ours()
    prepared.prepare_large_batches()
    return layers, x.to(own)


def _convolutions(
    kind: str, pixels: int, shape: ProductShape
) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """torch's convolution and ours, with an image whose result has so many pixels."""
    name, _, family = kind.partition("conv")
    kernel = 3 if "3x3" in family else 1
    stride = 2 if family.endswith("s2") else 1
    side, channels = round(pixels**0.5), max(1, shape.inputs // kernel**2)
    conv = nn.Conv2d(channels, shape.out, kernel, stride, kernel // 2, bias=False)
    high = 4 if name else 1
    matrix = random_matrix(shape.out, channels * kernel**2, shape.density, high)
    ours = PackedConv2d.from_conv(conv, BitmapLinear.from_matrix(matrix))
    label = "tiled-conv" if name else "sparse-conv"
    x = torch.randn(1, channels, side * stride, side * stride)
    return {f"dense-conv{family}": conv, f"{label}{family}": ours}, x
