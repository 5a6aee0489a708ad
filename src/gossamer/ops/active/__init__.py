"""Products that read only the weights of active inputs: see csrc/active/active.hpp.

A neuron is what one activation multiplies: column j of a weight (out, in), stored as row j of
`Neurons` with values (in, out). In a gated MLP row i of gate, up and down belongs to neuron i: gate
and up are stored as a Linear stores them, (neurons, in), down as its transpose, (neurons, out). Each
input reads its own active neurons, so these kernels serve decoding, not large batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.ops import _dispatch
from gossamer.ops.active import native, reference

__all__ = [
    "Neurons",
    "above",
    "gated_mlp",
    "kernel_name",
    "largest",
    "linear",
    "statistical_threshold",
    "statistical_top_k",
    "store",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Neurons:
    """values (neurons, width): float32, bfloat16 or int8, contiguous, on the CPU.

    scale, of int8 only: float32 (neurons, 1), one per neuron, or (1, width), one across the neurons.
    """

    values: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        values, scale = self.values, self.scale
        if values.dim() != 2 or values.dtype not in _DTYPES or not values.is_cpu:
            raise UsageError(
                "neurons are a matrix of float32, bfloat16 or int8 on the CPU, not "
                f"{tuple(values.shape)} of {values.dtype} on {values.device}"
            )
        if not values.is_contiguous():
            raise UsageError("neurons must be contiguous")
        neurons, width = values.shape
        if (scale is not None) != (values.dtype == torch.int8):
            raise UsageError("int8 neurons have a scale, others have none")
        if scale is None:
            return
        if scale.shape not in ((neurons, 1), (1, width)) or scale.dtype != torch.float32:
            raise UsageError(
                f"scale is float32 ({neurons}, 1) or (1, {width}), not {tuple(scale.shape)}"
            )
        if not (scale.is_contiguous() and scale.is_cpu):
            raise UsageError("scale must be contiguous and on the CPU")

    @property
    def nbytes(self) -> int:
        """Bytes of values and scale."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def to_float(self) -> Tensor:
        """The neurons as they count in products, float32 (neurons, width)."""
        return reference.to_float(self.values, self.scale)


def kernel_name() -> str:
    """The kernel that serves here, such as `active-neurons/avx512`."""
    return f"active-neurons/{_dispatch.isa()}"


def store(neurons: Tensor, dtype: torch.dtype = torch.bfloat16, scale: str = "neuron") -> Neurons:
    """Neurons (neurons, width) in the dtype asked for; pass `weight.t()` for the columns of a weight.

    int8 rounds to the nearest of 255 steps, symmetric about zero, up to the largest magnitude per
    `neuron` or `across` the neurons. Raises NonFiniteError where int8 would have to store NaN or inf.
    """
    if dtype not in _DTYPES or neurons.dim() != 2:
        raise UsageError(f"a matrix is stored as float32, bfloat16 or int8, not as {dtype}")
    if dtype != torch.int8:
        return Neurons(neurons.detach().to(dtype).contiguous())
    if scale not in ("neuron", "across"):
        raise UsageError(f"scale is 'neuron' or 'across', not {scale!r}")
    neurons = neurons.detach().float()
    if not bool(torch.isfinite(neurons).all()):
        raise NonFiniteError("neurons hold NaN or inf, which int8 cannot store")
    axis = 1 if scale == "neuron" else 0
    if neurons.shape[axis] == 0:
        steps = torch.ones(*((neurons.shape[0], 1) if axis else (1, neurons.shape[1])))
    else:
        steps = neurons.abs().amax(dim=axis, keepdim=True) / 127
        steps = torch.where(steps > 0, steps, 1.0)
    values = (neurons / steps).round().clamp(-127, 127).to(torch.int8)
    return Neurons(values.contiguous(), steps.contiguous())


def above(x: Tensor, threshold: float) -> Tensor:
    """int32 indices, ascending, of the entries of x (n,) with |x| > threshold. O(n).

    NaN counts as above, so that it is not hidden. Raises UsageError for a threshold below zero.
    """
    _check_vector(x)
    threshold = _checked(threshold)
    return (
        _dispatch.backend(reference, native).above(x, threshold)
        if _dispatch.direct(x)
        else _above(x, threshold)
    )


def largest(x: Tensor, k: int) -> Tensor:
    """int32 indices, ascending, of the k entries of x (n,) with the largest |x|. O(n) on average.

    Exact, by partial selection; ties keep the lower index and NaN is largest. Raises UsageError
    unless 0 <= k <= n.
    """
    _check_vector(x)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= x.numel():
        raise UsageError(f"k is a whole number from 0 to {x.numel()}, not {k!r}")
    return (
        _dispatch.backend(reference, native).largest(x, k)
        if _dispatch.direct(x)
        else _largest(x, k)
    )


def statistical_threshold(x: Tensor, k: int) -> Tensor:
    """The threshold above which k of n entries lie if they are Gaussian; (..., n) to (..., 1).

    mean + std * Phi^-1(1 - k / n), in float32, std over n rather than n - 1; linear, no sort. Real
    activations are not Gaussian: the count is near k, not k (Spark Transformer, 2025). Raises
    UsageError unless 0 < k < n.
    """
    n = x.shape[-1] if x.dim() else 0
    if isinstance(k, bool) or not isinstance(k, int) or not 0 < k < n:
        raise UsageError(f"k is a whole number between 0 and {n}, not {k!r}")
    wide = x.float()
    quantile = torch.special.ndtri(torch.tensor(1 - k / n, dtype=torch.float64)).item()
    mean = wide.mean(dim=-1, keepdim=True)
    return mean + quantile * wide.std(dim=-1, keepdim=True, correction=0)


def statistical_top_k(x: Tensor, k: int) -> Tensor:
    """max(x - statistical_threshold(x, k), 0) in x's dtype: about k of n entries stay, shrunken.

    Differentiable, also through mean and standard deviation (Spark Transformer, 2025).
    """
    return torch.relu(x.float() - statistical_threshold(x, k)).to(x.dtype)


def linear(
    x: Tensor,
    columns: Neurons,
    bias: Tensor | None = None,
    *,
    threshold: float = 0.0,
    index: Tensor | None = None,
) -> Tensor:
    """x (..., in) times the weight whose columns are given, (in, out), plus bias (out,).

    Each row of x uses the columns with |x| > threshold, or those in `index`, int32 or int64, for
    all rows. float32 or bfloat16, result in the same, sums in float32. Inactive columns are not
    read, so NaN there does not show; a NaN in x does. O(active * out) per row. Not differentiable.
    """
    _check_input(x, columns.values.shape[0])
    _check_bias(bias, columns.values.shape[1])
    threshold = _checked(threshold)
    if index is not None:
        _check_index(index, columns.values.shape[0])
    parts = (columns.values, columns.scale, bias, index, threshold)
    if _dispatch.direct(x):
        return _dispatch.backend(reference, native).linear(x, *parts)
    return _active_linear(x, *parts)


def gated_mlp(
    x: Tensor,
    gate: Neurons,
    up: Neurons,
    down: Neurons,
    *,
    threshold: float | None = None,
    k: int | None = None,
    by: str = "product",
) -> Tensor:
    """down of the kept neurons of h = silu(gate x) * (up x); x (..., in) to (..., out).

    Exactly one of `threshold`, which keeps |score| above it, and `k`, which keeps so many. The
    score is h with by="product", and silu(gate x) with by="gate", which then reads the up weights
    of the kept neurons only. x float32 or bfloat16, result in the same. O(in * neurons + kept *
    out) per row. Not differentiable.
    """
    neurons = gate.values.shape[0]
    _check_input(x, gate.values.shape[1])
    if up.values.shape != gate.values.shape or down.values.shape[0] != neurons:
        raise UsageError(
            f"gate is {tuple(gate.values.shape)}, up {tuple(up.values.shape)} and down "
            f"{tuple(down.values.shape)}: they need the same number of neurons"
        )
    if (threshold is None) == (k is None):
        raise UsageError("give either threshold or k")
    if by not in ("product", "gate"):
        raise UsageError(f"by is 'product' or 'gate', not {by!r}")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= neurons):
        raise UsageError(f"k is a whole number from 0 to {neurons}, not {k!r}")
    limit, top = (_checked(threshold), -1) if threshold is not None else (0.0, k)
    assert top is not None
    if _dispatch.direct(x):
        weights = ((part.values, part.scale) for part in (gate, up, down))
        return _dispatch.backend(reference, native).gated_mlp(x, *weights, limit, top, by == "gate")
    parts = (gate.values, gate.scale, up.values, up.scale, down.values, down.scale)
    return _active_gated_mlp(x, *parts, limit, top, by == "gate")


def _checked(threshold: float) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise UsageError(f"threshold is a number, not {threshold!r}")
    if not threshold >= 0 or math.isinf(threshold):
        raise UsageError(f"threshold is a finite number from 0, not {threshold}")
    return float(threshold)


def _check_vector(x: Tensor) -> None:
    if x.dim() != 1 or x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu:
        raise UsageError(
            f"expected a vector of float32 or bfloat16 on the CPU, not {tuple(x.shape)} of "
            f"{x.dtype} on {x.device}"
        )


def _check_input(x: Tensor, width: int) -> None:
    if x.dim() == 0 or x.shape[-1] != width:
        raise UsageError(f"expected inputs of width {width}, not {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu:
        raise UsageError(f"inputs are float32 or bfloat16 on the CPU, not {x.dtype} on {x.device}")


def _check_bias(bias: Tensor | None, width: int) -> None:
    if bias is not None and (bias.shape != (width,) or not bias.is_floating_point()):
        raise UsageError(f"bias has shape {tuple(bias.shape)}, not ({width},)")


def _check_index(index: Tensor, neurons: int) -> None:
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise UsageError("index is a vector of int32 or int64")
    if torch.compiler.is_compiling() or index.numel() == 0:
        return
    if int(index.min()) < 0 or int(index.max()) >= neurons:
        raise UsageError(f"index names columns outside 0 to {neurons - 1}")


@torch.library.custom_op("gossamer::active_above", mutates_args=())
def _above(x: Tensor, threshold: float) -> Tensor:
    return _dispatch.backend(reference, native).above(x, threshold)


@_above.register_fake
def _(x: Tensor, threshold: float) -> Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


@torch.library.custom_op("gossamer::active_largest", mutates_args=())
def _largest(x: Tensor, k: int) -> Tensor:
    return _dispatch.backend(reference, native).largest(x, k)


@_largest.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return x.new_empty(k, dtype=torch.int32)


@torch.library.custom_op("gossamer::active_linear", mutates_args=())
def _active_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    threshold: float,
) -> Tensor:
    if index is not None:
        _check_index(index, values.shape[0])
    return _dispatch.backend(reference, native).linear(x, values, scale, bias, index, threshold)


@_active_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    threshold: float,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[1])


@torch.library.custom_op("gossamer::active_gated_mlp", mutates_args=())
def _active_gated_mlp(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor | None,
    up: Tensor,
    up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    threshold: float,
    top: int,
    by_gate: bool,
) -> Tensor:
    parts = ((gate, gate_scale), (up, up_scale), (down, down_scale))
    return _dispatch.backend(reference, native).gated_mlp(x, *parts, threshold, top, by_gate)


@_active_gated_mlp.register_fake
def _(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor | None,
    up: Tensor,
    up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    threshold: float,
    top: int,
    by_gate: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], down.shape[1])
