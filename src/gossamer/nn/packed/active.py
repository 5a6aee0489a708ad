"""A linear layer that reads only the weights of the inputs that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.activations import InputState
from gossamer.core.budget import Fraction, Threshold
from gossamer.core.errors import UsageError
from gossamer.nn.active import ActiveProduct, Counts, Rotation
from gossamer.nn.packed.base import KERNEL_DTYPES, PackedLayer, affine, frozen
from gossamer.ops.active import Neurons, store

_EXACT = ("norms", "scales")
"""Buffers that stay float32, whatever the model's dtype."""


class ActiveLinear(PackedLayer):
    """y = W (x kept) + b; takes the place of a Linear of the same shape.

    values: the weight as columns (in, out), its only copy: float32, bfloat16, or int8 with `scales`.
    budget: which inputs are kept, by magnitudes times `norms` where those are given. by: the
    method, as the command line has it. bypass: (down, up), the low-rank part for inputs that are
    not kept. rotation: shared by the layers with the same input; `leads` says whose state dict
    holds it.
    """

    values: Tensor
    scales: Tensor | None
    norms: Tensor | None
    down: Tensor | None
    up: Tensor | None
    turns: Tensor | None
    typed: Tensor
    pattern = ""
    requested_density = None

    def __init__(
        self,
        columns: Neurons,
        state: InputState,
        budget: Threshold | Fraction,
        bias: Tensor | None = None,
        *,
        by: str = "",
        rotation: Rotation | None = None,
        leads: str = "",
        own_name: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = columns.values.shape
        self.budget, self.by, self.kept_inputs = budget, by, state.density
        self.facts = dict(state.facts)
        self.rotation, self.leads = rotation, leads
        down, up = (None, None) if state.bypass is None else state.bypass
        leader = rotation is not None and leads == own_name
        parts = {
            "values": columns.values, "scales": columns.scale, "norms": state.scale,
            "down": down, "up": up,
            "turns": rotation.matrix if rotation is not None and leader else None,
        }  # fmt: skip
        for name, part in parts.items():
            self.register_buffer(name, part)
        kind = dtype if columns.scale is not None else columns.values.dtype
        self.register_buffer("typed", torch.empty(0, dtype=kind), persistent=False)
        self.bias = frozen(bias)
        self._product: ActiveProduct | None = None

    @property
    def active(self) -> ActiveProduct:
        """What serves calls and counts them; made anew where the tensors changed."""
        values = self.values
        if self._product is None or self._product.columns.values is not values:
            self._product = ActiveProduct(
                Neurons(values, self.scales), self.state, self.budget, self.bias, self.rotation
            )
        return self._product

    @property
    def state(self) -> InputState:
        """The norms and the low-rank part."""
        bypass = None if self.down is None or self.up is None else (self.down, self.up)
        return InputState(self.kept_inputs, self.norms, bypass, self.facts)

    def to_matrix(self) -> Tensor:
        """The dense weight (out, in); of a turned layer turned back."""
        columns = Neurons(self.values, self.scales)
        matrix = columns.to_float() if self.scales is not None else self.values
        weight = matrix.t()
        if self.rotation is not None:
            weight = (weight.float() @ self.rotation.matrix.float().t()).to(weight.dtype)
        return weight.contiguous()

    def like(self) -> Tensor:
        """An empty tensor of the dtype that the weight has for others."""
        return self.typed if self.scales is not None else self.values

    @property
    def has_kernel(self) -> bool:
        """Integers stay as they are, whatever the model's dtype."""
        return self.scales is not None or self.values.dtype in KERNEL_DTYPES

    @property
    def density(self) -> float:
        """1.0: every weight is stored."""
        return 1.0

    @property
    def nbytes(self) -> int:
        """Of the weight and all that the method adds, a rotation with the layer that leads."""
        parts = (self.values, self.scales, self.norms, self.down, self.up, self.turns)
        return sum(part.nbytes for part in parts if part is not None)

    def product(self, x: Tensor) -> Tensor:
        """By the kernel for few tokens, dense for more."""
        if x.dtype in KERNEL_DTYPES:
            return self.active(x)
        return self.active(x.float()).to(x.dtype)

    def dense_product(self, x: Tensor) -> Tensor:
        """By the whole matrix; keeps every input."""
        return affine(x, self.to_matrix(), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActiveLinear:
        before = {name: self._buffers[name] for name in (*_EXACT, "values")}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            integers = name == "values" and self.scales is None
            if buffer is not None and moved is not None and not integers:
                self._buffers[name] = buffer.to(moved.device)
        self.follow()
        return self

    def follow(self) -> None:
        """Serve with the tensors as they are now."""
        if self.turns is not None and self.rotation is not None:
            self.rotation.matrix = self.turns
        self._product = None

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        self.follow()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_product": None}

    def extra_repr(self) -> str:
        """Shape, what is kept, dtype."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"keeps={self.kept_inputs:.3f}, bias={self.bias is not None}, "
            f"dtype={self.values.dtype}"
        )


def columns_of(weight: Tensor, bits: int | None = None) -> Neurons:
    """The columns of a weight (out, in), in its dtype or as integers of 8 bits.

    Integers have a scale per column or per output, whichever is nearer to the weight.
    """
    if bits is None:
        return Neurons(weight.detach().t().contiguous())
    if bits != 8:
        raise UsageError(f"columns are integers of 8 bits or none, not of {bits}")
    columns = weight.detach().t().float()
    both = [store(columns, torch.int8, scale) for scale in ("neuron", "across")]
    errors = [float((each.to_float() - columns).norm()) for each in both]
    return both[errors.index(min(errors))]


@contextmanager
def every_token_chooses(model: nn.Module) -> Iterator[None]:
    """While open, packed layers choose inputs in calls of many tokens too, as they do in decoding.

    So the quality of a text is that of generating it. Such calls are not counted.
    """
    layers = [module for module in model.modules() if isinstance(module, ActiveLinear)]
    before = [(x.active.prompts, x.active.counts) for x in layers]
    try:
        for layer in layers:
            layer.active.prompts, layer.active.counts = True, Counts()
        yield
    finally:
        for layer, (prompts, counts) in zip(layers, before, strict=True):
            layer.active.prompts, layer.active.counts = prompts, counts
