"""Suite `conv`: MobileNet-v1's geometry with random weights, its 1x1 convolutions 90% sparse, and
single 3x3 convolutions of a residual network's sizes.

Whoever runs it gets what he would have: torch dense contiguous, channels last, and traced, frozen
and fused by oneDNN; onnxruntime, which fuses and picks its own layout.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.bench.measure import Limits, Repeats, interleaved
from gossamer.core.errors import GossamerError
from gossamer.core.matrix import as_matrix, write_matrix
from gossamer.core.pattern import Unstructured
from gossamer.core.select import select
from gossamer.engine.serve.compress import compress
from gossamer.nn import BitmapLinear, PackedConv2d
from gossamer.nn.chain import fuse

WIDTHS = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
WIDTHS += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]
"""Channels in and out of each block, and the stride of its depthwise convolution."""


@dataclass(frozen=True)
class Case:
    """Images of `size` pixels a side; `density` of the 1x1 convolutions.

    With `channels`, one 3x3 convolution of so many in and out instead, where `group` neighbouring
    outputs keep the same weights.
    """

    name: str
    size: int
    density: float
    batch: int
    channels: int = 0
    group: int = 1


def cases() -> list[Case]:
    """One image, and a batch of 8; then single layers."""
    found = [
        Case(f"mobilenet-v1 geometry {size}x{size} density 0.1 batch {batch}", size, 0.1, batch)
        for size, batch in ((224, 1), (224, 8))
    ]
    for channels, size in ((64, 56), (128, 28), (256, 14)):
        for density in (0.5, 0.3, 0.2, 0.1):
            for group in (1, 4):
                shared = " in groups of 4 outputs" if group > 1 else ""
                name = f"3x3 {channels}x{size}x{size} density {density}{shared}"
                found.append(Case(name, size, density, 1, channels, group))
    return found


def build(widths: list[tuple[int, int, int]] | None = None) -> nn.Sequential:
    """Random weights, batch norms folded into the biases; (images, 3, h, w) to 1000 scores."""
    torch.manual_seed(0)
    widths = WIDTHS if widths is None else widths
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0][0], 3, 2, 1), nn.ReLU(inplace=True)]
    for inputs, out, stride in widths:
        layers += [nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(inputs, out, 1), nn.ReLU(inplace=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1][1], 1000)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers).eval()


def prune(model: nn.Sequential, density: float) -> nn.Sequential:
    """Zero the smallest weights of every 1x1 convolution, in place."""
    for layer in model:
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            weight = layer.weight.detach()
            mask = select(weight.flatten(1).abs(), Unstructured(), density).mask
            weight.mul_(mask.reshape(weight.shape))
    return model


def measure(case: Case, limits: Limits, rounds: Repeats | int = 7) -> dict[str, Any]:
    """Whole forward passes; raises GossamerError where ours differs from torch's.

    `served`: whether `compress` puts kernels there; a single layer is measured with its kernel in
    any case.
    """
    model = layer(case) if case.channels else prune(build(), case.density)
    sparse = copy.deepcopy(model)
    served = any(record.kernel for record in compress(sparse, latency="rule").layers)
    if case.channels and not served:
        sparse = packed(model)
    inputs = case.channels or 3
    x = torch.randn(
        case.batch, inputs, case.size, case.size, generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        calls = _calls(model, sparse, x)
        expected = model(x)
        for name, call in calls.items():
            error = float((call() - expected).norm() / expected.norm())
            if not error < 1e-3:
                raise GossamerError(f"{name} is wrong on {case}: relative error {error:.1e}")
        turns = interleaved(calls, rounds)
    times = turns.seconds
    torch_best = min(taken for name, taken in times.items() if name.startswith("torch dense"))
    return {
        **turns.record(case, limits.seconds(0, _flops(model, x))),
        "ratio_to_torch": torch_best / times["gossamer"],
        "served": served,
    }


def layer(case: Case) -> nn.Sequential:
    """One 3x3 convolution; the weights kept are those of the groups with the largest norms."""
    torch.manual_seed(0)
    conv = nn.Conv2d(case.channels, case.channels, 3, 1, 1)
    matrix = as_matrix(conv)
    norms = matrix.reshape(-1, case.group, matrix.shape[1]).norm(dim=1)
    mask = select(norms, Unstructured(), case.density).mask
    write_matrix(conv, matrix * mask.repeat_interleave(case.group, dim=0))
    return nn.Sequential(conv).eval()


def packed(model: nn.Sequential) -> nn.Sequential:
    """Its convolution behind our kernel whether or not that pays."""
    conv = model[0]
    assert isinstance(conv, nn.Conv2d)
    weight = BitmapLinear.from_matrix(as_matrix(conv), conv.bias)
    forced = nn.Sequential(PackedConv2d.from_conv(conv, weight)).eval()
    fuse(forced)
    return forced


def _calls(model: nn.Sequential, sparse: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    last = torch.channels_last
    turned = copy.deepcopy(model).to(memory_format=last)  # type: ignore[call-overload]
    turned_x = x.to(memory_format=last)
    found: dict[str, Callable[[], Tensor] | None] = {
        "gossamer": lambda: sparse(x),
        "torch dense contiguous": lambda: model(x),
        "torch dense channels last": lambda: turned(turned_x),
        "torch dense fused": _fused(model, x),
        "onnxruntime dense": _onnx(model, x),
    }
    return {name: call for name, call in found.items() if call is not None}


def _fused(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Traced, frozen and rewritten for oneDNN, which fuses activations and picks its own layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is in maintenance
        traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, x)))
        for _ in range(2):  # the first calls compile
            traced(x)
    return lambda: traced(x)


def _onnx(model: nn.Module, x: Tensor) -> Callable[[], Tensor] | None:
    """onnxruntime, which fuses activations and picks its own layout."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return None
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends its other exporter
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), str(path), input_names=["x"], dynamo=False)
        session = onnxruntime.InferenceSession(str(path), options)
    inputs = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _flops(model: nn.Sequential, x: Tensor) -> int:
    """Two per kept weight and place where it counts."""
    total = 0
    with torch.inference_mode():
        for module in model:
            x = module(x)
            if isinstance(module, nn.Conv2d | nn.Linear):
                places = x.numel() // module.weight.shape[0]
                total += 2 * int((module.weight != 0).sum()) * places
    return total
