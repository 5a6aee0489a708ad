"""Suite `conv`: MobileNet-v1's geometry with random weights, its 1x1 convolutions 90% sparse."""

from __future__ import annotations

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

from gossamer.bench.measure import Limits, interleaved
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Unstructured
from gossamer.core.select import select
from gossamer.engine.compress import compress

WIDTHS = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
WIDTHS += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]
"""Channels in and out of each block, and the stride of its depthwise convolution."""


@dataclass(frozen=True)
class Case:
    """Images of `size` pixels a side; `density` of the 1x1 convolutions."""

    name: str
    size: int
    density: float
    batch: int


def cases() -> list[Case]:
    """One image, and a batch of 8."""
    return [
        Case(f"mobilenet-v1 geometry {size}x{size} density 0.1 batch {batch}", size, 0.1, batch)
        for size, batch in ((224, 1), (224, 8))
    ]


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


def measure(case: Case, limits: Limits, repeats: int = 7) -> dict[str, Any]:
    """Whole forward passes; raises GossamerError where ours differs from torch's."""
    model = prune(build(), case.density)
    x = torch.randn(case.batch, 3, case.size, case.size, generator=torch.Generator().manual_seed(1))
    sparse = prune(build(), case.density)
    compress(sparse)
    calls = _calls(model, sparse, x)
    with torch.inference_mode():
        expected = model(x)
        for name, call in calls.items():
            error = float((call() - expected).norm() / expected.norm())
            if not error < 1e-3:
                raise GossamerError(f"{name} is wrong on {case}: relative error {error:.1e}")
        seconds = interleaved(calls, repeats)
    dense = {name: taken for name, taken in seconds.items() if "dense" in name}
    best = min(dense, key=lambda name: dense[name])
    least, binds = limits.seconds(0, _flops(model, x))
    return {
        "case": vars(case),
        "milliseconds": {name: 1e3 * taken for name, taken in seconds.items()},
        "best_dense": best,
        "ratio": dense[best] / seconds["gossamer"],
        "fraction_of_limit": least / seconds["gossamer"],
        "limit": binds,
    }


def _calls(model: nn.Sequential, sparse: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    last = torch.channels_last
    turned: nn.Module = build()
    turned.load_state_dict(model.state_dict())
    turned = turned.to(memory_format=last)  # type: ignore[call-overload]
    turned_x = x.to(memory_format=last)
    found: dict[str, Callable[[], Tensor] | None] = {
        "gossamer": lambda: sparse(x),
        "torch dense contiguous": lambda: model(x),
        "torch dense channels last": lambda: turned(turned_x),
        "onnxruntime dense": _onnx(model, x),
    }
    return {name: call for name, call in found.items() if call is not None}


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
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                places = x.numel() // layer.weight.shape[0]
                total += 2 * int((layer.weight != 0).sum()) * places
    return total
