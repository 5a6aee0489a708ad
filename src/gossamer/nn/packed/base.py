"""What every packed layer shares: it behaves like the layer whose place it took."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gossamer.core.errors import UsageError
from gossamer.nn.packed.lazy import LazyWeight
from gossamer.ops import _dispatch
from gossamer.ops.prepared import version

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""Of values that kernels read."""


class PackedLayer(nn.Module, ABC):
    """A layer whose weight is stored packed and multiplied by a kernel.

    `weight` is the dense weight as the layer replaced held it, read-only, unpacked on demand and no
    part of the state dict. Under autocast the result has autocast's dtype. Inside torch.func and
    forward-mode differentiation, and after `half()` or `double()`, for which no kernel exists, the
    weight is unpacked at every call. Raises UsageError inside torch.jit.trace and ONNX exporters.

    kind: the class of the layer replaced, None where it was none. own: names of the attributes that
    are the packed layer's; all others came from the layer replaced and go back to it. transposed:
    `weight` is (in, out), as transformers' Conv1D has it. trains: whether the weight had gradients.
    """

    in_features: int
    out_features: int
    requested_density: float | None
    kind: type[nn.Module] | None = None
    own: frozenset[str] = frozenset()
    transposed: bool = False
    trains: bool = True
    values: Tensor
    bias: nn.Parameter | None
    _form: tuple[int, Any] | None = None

    @abstractmethod
    def to_matrix(self) -> Tensor:
        """The dense matrix (out, in)."""

    @property
    @abstractmethod
    def density(self) -> float:
        """The fraction of weights stored that are not zero."""

    @abstractmethod
    def like(self) -> Tensor:
        """A tensor with the dtype and device that the weight has for others."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """The layer's result, by a kernel, in x's dtype."""

    @abstractmethod
    def dense_product(self, x: Tensor) -> Tensor:
        """The same by torch's own operations with the unpacked weight, in the weight's dtype."""

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel reads the values in the dtype that they have now."""
        return self.like().dtype in KERNEL_DTYPES

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of `weight`."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def make_form(self) -> Any:
        """The copy of the weights for speed; only of layers that have one."""
        raise NotImplementedError

    def refresh(self) -> Any:
        """The copy of the weights for speed, made anew where the values changed; None: no such."""
        if self._form is None:
            return None
        plain = type(self.values) is Tensor and self.values.is_cpu
        if not (plain and self.has_kernel) or is_in_torch_dispatch_mode():
            return None
        if self._form[0] != version(self.values):
            self._form = (version(self.values), self.make_form())
        return self._form[1]

    def dense_weight(self) -> Tensor:
        """A new tensor: the dense weight as the layer replaced held it."""
        matrix = self.to_matrix().to(self.like().dtype)
        return matrix.t().contiguous() if self.transposed else matrix

    @property
    def weight(self) -> Tensor:
        """The dense weight, read-only; only its numbers cost anything."""
        if torch.compiler.is_compiling():
            return self.dense_weight()  # dropped by the compiler where only its dtype is read
        return LazyWeight.make(self.dense_weight, self.weight_shape, self.like())

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) to (..., out), or images to images, in the input's dtype."""
        _dispatch.refuse_tracing()
        x, kind = input, input.device.type
        if kind != "cpu" or not self.values.is_cpu:
            where = f"the input is on {kind} and the weights are on {self.values.device.type}"
            raise UsageError(f"packed layers run on the CPU only; {where}")
        if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        if not x.is_floating_point():
            raise UsageError(f"inputs of a packed layer are floating-point, not {x.dtype}")
        if not self.has_kernel or _dispatch.transformed():
            with torch.autocast(kind, enabled=False):
                return self.dense_product(x)
        return self.product(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        served = self.has_kernel
        super()._apply(fn, recurse)
        self.refresh()
        if served and not self.has_kernel:
            warnings.warn(
                f"packed layers have no kernel for {self.like().dtype}: they unpack their weights at every "
                "call; float32 and bfloat16 have kernels",
                stacklevel=3,
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without a form of other values."""
        form = None if self.refresh() is None else self._form
        buffers = {name: _signed(buffer) for name, buffer in self._buffers.items()}
        return {
            **self.__dict__,
            "_buffers": buffers,
            "_form": form and (0, _each(form[1], _signed)),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, buffer in self._buffers.items():
            self._buffers[name] = _unsigned(buffer)
        if self._form is not None:
            self._form = (version(self.values), _each(self._form[1], _unsigned))


def _each(form: Any, change: Callable[[Any], Any]) -> Any:
    """A form with every part changed."""
    return replace(form, **{f.name: change(getattr(form, f.name)) for f in fields(form)})


def _signed(part: Any) -> Any:
    """16-bit numbers without a sign, which torch cannot pickle, as such with one."""
    unsigned = isinstance(part, Tensor) and part.dtype == torch.uint16
    return part.view(torch.int16) if unsigned else part


def _unsigned(part: Any) -> Any:
    signed = isinstance(part, Tensor) and part.dtype == torch.int16
    return part.view(torch.uint16) if signed else part


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times the transpose of weight (out, in), plus bias, in x's dtype."""
    own: Any = weight.dtype
    bias = None if bias is None else bias.to(own)
    return nn.functional.linear(x.to(own), weight, bias).to(x.dtype)


def frozen(bias: Tensor | None) -> nn.Parameter | None:
    """A parameter as it is, another tensor as one without gradients."""
    if bias is None or isinstance(bias, nn.Parameter):
        return bias
    return nn.Parameter(bias.detach(), requires_grad=False)
