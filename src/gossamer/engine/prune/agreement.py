"""Whether two networks compute the same, tried on the example and on random inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.engine.hooks import evaluating

Outputs = list[list[Tensor]]
"""The tensors of every output, by input."""

T = TypeVar("T")

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest difference in units of the largest output. Networks in float64 may cast inside."""


def clone(model: nn.Module) -> nn.Module:
    """A deep copy, also where a layer holds a weight that it recomputes at every forward."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UsageError(f"the model cannot be copied: {one_line(error)}") from error


def precise(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of the model and of the example in float64, in their own dtype where that fails."""
    reference, wide = clone(model), example.detach().clone()
    try:
        reference = reference.double()
        wide = wide.double() if wide.is_floating_point() else wide
        outputs(reference, [wide])
    except Exception:
        return clone(model), example.detach().clone()
    return reference, wide


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in an output of nested mappings and sequences."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str | bytes):
        for value in output:
            yield from tensors(value)


def outputs(model: nn.Module, inputs: Sequence[Tensor]) -> Outputs:
    """What the model returns in eval mode, with the same random numbers at every call."""
    found = []
    with evaluating(model), fenced(inputs[0].device):
        for x in inputs:
            torch.manual_seed(0)
            # The input is copied, because a network may work on it in place.
            found.append([t.detach().clone() for t in tensors(model(x.clone()))])
    return found


@contextmanager
def fenced(device: torch.device) -> Iterator[None]:
    """While open, random numbers may be drawn; the generators' states are restored at the end."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def probes(model: nn.Module, example: Tensor) -> list[Tensor]:
    """The example and random inputs like it: of its shape, of other batch sizes, and of another
    size in space or time. Inputs that the model does not take are left out."""
    shape = list(example.shape)
    sizes = [shape, [3, *shape[1:]]]
    if len(shape) == 4:
        sizes += [[1, shape[1], shape[2] + 3, shape[3] + 5], [1, shape[1], *_doubled(shape[2:])]]
    elif len(shape) == 3:
        sizes.append([2, shape[1] + 3, shape[2]])
    generator = torch.Generator().manual_seed(0)
    inputs = [example]
    for size in sizes:
        x = _random(example, size, generator)
        try:
            outputs(model, [x])
        except Exception:
            continue
        inputs.append(x)
    return inputs


def difference(given: Outputs, other: Outputs) -> str:
    """How two networks' outputs differ; empty where they agree within rounding."""
    for xs, ys in zip(given, other, strict=True):
        if [x.shape for x in xs] != [y.shape for y in ys]:
            return "they reach the model's output"
        for x, y in zip(xs, ys, strict=True):
            error = largest(x, y)
            if x.is_floating_point():
                scale = float(x.double()[x.isfinite()].abs().max()) if x.isfinite().any() else 1.0
                error = error / max(scale, torch.finfo(torch.float32).tiny)
            if error > (_TOLERANCE.get(x.dtype, 3e-2) if x.is_floating_point() else 0):
                return f"cutting them changes the output by {error:.2g} of its largest value"
    return ""


def largest(x: Tensor, y: Tensor) -> float:
    """The largest absolute difference; equal infinities and two NaN differ by 0."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    a, b = x.detach().cpu().to(wide), y.detach().cpu().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = (a - b).abs().masked_fill(same, 0).nan_to_num(nan=torch.inf)
    return float(gap.max()) if gap.numel() else 0.0


def choose(items: Sequence[T], check: Callable[[Sequence[T]], str]) -> tuple[list[T], list[str]]:
    """As many items as together pass `check`, which returns a reason or nothing, and by item the
    reason why it is not among them. Halves what fails, so a few bad ones cost few checks."""
    chosen: list[T] = []
    reasons = [""] * len(items)

    def take(first: int, last: int) -> None:
        trial = [*chosen, *items[first:last]]
        reason = check(trial)
        if not reason:
            chosen[:] = trial
        elif last - first == 1:
            reasons[first] = reason
        else:
            middle = (first + last) // 2
            take(first, middle)
            take(middle, last)

    if items:
        take(0, len(items))
    return chosen, reasons


def agrees(given: Outputs, model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """How the model's outputs differ from those given, or the error that its forward ends in."""
    try:
        return difference(given, outputs(model, inputs))
    except Exception as error:
        return f"cutting them makes the forward fail ({one_line(error)})"


def one_line(error: Exception) -> str:
    """An error's type and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _doubled(sizes: Sequence[int]) -> list[int]:
    return [2 * size for size in sizes]


def _random(example: Tensor, size: Sequence[int], generator: torch.Generator) -> Tensor:
    if example.is_floating_point():
        wide = example.double()
        spread = float(wide.std()) if wide.numel() > 1 else 0.0
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        return (x * (2 * spread or 1.0) + float(wide.mean())).to(example.device, example.dtype)
    low, high = int(example.min()), int(example.max())
    return torch.randint(low, high + 1, size, generator=generator).to(example)
