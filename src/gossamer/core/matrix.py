"""Every prunable weight seen as one (out, in) matrix whose columns are contracted with inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gossamer.core.errors import UsageError


def is_prunable(module: nn.Module) -> bool:
    """Linear, Embedding, Conv2d with groups=1 or transformers' Conv1D."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return True
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return is_transposed(module)


_PLAIN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("forward",),
    nn.Conv1d: ("forward", "_conv_forward"),
    nn.Conv2d: ("forward", "_conv_forward"),
    nn.Conv3d: ("forward", "_conv_forward"),
    nn.ConvTranspose1d: ("forward",),
    nn.ConvTranspose2d: ("forward",),
    nn.ConvTranspose3d: ("forward",),
    nn.Embedding: ("forward",),
    nn.Bilinear: ("forward",),
    nn.RNN: ("forward",),
    nn.LSTM: ("forward",),
    nn.GRU: ("forward",),
    nn.RNNCell: ("forward",),
    nn.LSTMCell: ("forward",),
    nn.GRUCell: ("forward",),
    nn.MultiheadAttention: ("forward",),
}
_PLAIN_BY_NAME = frozenset(
    {
        "transformers.pytorch_utils.Conv1D.forward",
        "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
        "timm.layers.linear.Linear.forward",
    }
)
"""Forwards that are the plain product of the stored weight, in libraries that core never imports."""


def why_not_plain(module: nn.Module, parameter: str = "weight") -> str | None:
    """Why a prunable module may compute something else than the product with its stored weight.

    None where it is that product: its class's forward is the known one, and its weight is a
    parameter of its own. Otherwise zeros in the stored weight need not be zeros in the forward, and
    no other layer can take its place.
    """
    if parameter not in module._parameters:
        return _recomputed(module, parameter)
    return own_forward(module)


def own_forward(module: nn.Module) -> str | None:
    """Why a module of a known kind may not compute what its kind computes; None where it does."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance, so what it computes is unknown"
    if type(module).__call__ is not nn.Module.__call__:
        return f"{type(module).__name__} is called its own way, so what it computes is unknown"
    kind = next((kind for kind in _PLAIN if isinstance(module, kind)), None)
    for method in _PLAIN.get(kind, ("forward",)):  # type: ignore[arg-type]
        own = getattr(type(module), method)
        known = kind is not None and own is getattr(kind, method)
        if not known and f"{own.__module__}.{own.__qualname__}" not in _PLAIN_BY_NAME:
            return (
                f"{type(module).__name__} has a forward of its own, so what it computes is unknown"
            )
    return None


def _recomputed(module: nn.Module, parameter: str) -> str:
    """Why a weight that is no parameter cannot be written to, and how to make it one."""
    told = "its weight" if parameter == "weight" else f"its {parameter}"
    if nn.utils.parametrize.is_parametrized(module, parameter):
        entries = module.parametrizations[parameter]  # type: ignore[index]
        kinds = [type(each).__name__.lstrip("_") for each in entries]
        return (
            f"{told} is recomputed at every forward ({', '.join(kinds)}); call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {parameter!r}) first"
        )
    if f"{parameter}_mask" in module._buffers:
        return (
            f"{told} is recomputed at every forward from a mask of torch.nn.utils.prune; call "
            f"torch.nn.utils.prune.remove(layer, {parameter!r}) first"
        )
    remedy = f"make the {parameter} an ordinary parameter first"
    if f"{parameter}_g" in module._parameters:
        remedy = f"call torch.nn.utils.remove_weight_norm(layer, {parameter!r}) first"
    if f"{parameter}_orig" in module._parameters:
        remedy = f"call torch.nn.utils.remove_spectral_norm(layer, {parameter!r}) first"
    return f"{told} is recomputed at every forward; {remedy}"


def is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores (in, out). Known by name, so that core
    does not import transformers."""
    weight = getattr(module, "weight", None)
    return (
        any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)  # FSDP2 makes a subclass
        and hasattr(module, "nf")
        and isinstance(weight, Tensor)
        and weight.dim() == 2
    )


@dataclass(frozen=True, eq=False)
class Weight:
    """One prunable matrix: a parameter of a module, or a part of one that stacks several.

    part: the place, or the rows, along the parameter's first axis; None for all of it. transposed:
    whether the stored part is (in, out). A module of transformers' Conv1D is so in any case.
    """

    module: nn.Module
    parameter: str = "weight"
    part: int | slice | None = None
    transposed: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the whole weight of a layer that `as_matrix` knows and kernels serve."""
        return self.parameter == "weight" and self.part is None and is_prunable(self.module)

    @property
    def reads_input(self) -> bool:
        """Whether the weight multiplies what its module is called with, as `inputs_of` lays it."""
        return self.plain or (isinstance(self.module, _ConvNd) and self.module.groups == 1)

    @property
    def whole(self) -> Tensor:
        """The whole parameter, detached, sharing storage."""
        tensor = getattr(self.module, self.parameter)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    @property
    def tensor(self) -> Tensor:
        """The part in its stored layout, detached, sharing storage."""
        return self.whole if self.part is None else self.whole[self.part]

    def matrix(self) -> Tensor:
        """The weight as (out, in); of an Embedding as it is, (entries, width).

        A convolution becomes (out, taps * channels in), input channels innermost, so that N:M
        groups run along input channels; a transposed one (out * taps, channels in), for each of its
        inputs multiplies every tap. A view where the layout allows: do not write through it.
        """
        tensor, module = self.tensor, self.module
        if isinstance(module, _ConvTransposeNd):
            groups = module.groups
            tensor = tensor.unflatten(0, (groups, tensor.shape[0] // groups))
            return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])
        if isinstance(module, _ConvNd):
            return tensor.movedim(1, -1).reshape(tensor.shape[0], -1)
        if tensor.dim() > 2:
            return tensor.reshape(tensor.shape[0], -1)
        return tensor.t() if self.flipped else tensor

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Write an (out, in) matrix, laid out as `matrix()`, into the weight in place.

        Raises UsageError for another shape, and where the module then reads something else.
        """
        expected = self.matrix().shape
        if matrix.shape != expected:
            raise UsageError(f"weight is {tuple(expected)} as a matrix, not {tuple(matrix.shape)}")
        self.tensor.copy_(self._stored(matrix))
        if not torch.equal(self.matrix(), matrix.to(self.whole)):
            raise UsageError(
                f"what was written into {type(self.module).__name__}.{self.parameter} is not what "
                "it then holds: its weight is computed, or shares its memory"
            )

    def _stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix()`."""
        tensor, module = self.tensor, self.module
        if isinstance(module, _ConvTransposeNd):
            out, taps = tensor.shape[1], tensor.shape[2:]
            split = matrix.reshape(module.groups, out, *taps, -1)
            return split.movedim(-1, 1).reshape(tensor.shape)
        if isinstance(module, _ConvNd):
            return matrix.reshape(tensor.shape[0], *tensor.shape[2:], -1).movedim(-1, 1)
        if tensor.dim() > 2:
            return matrix.reshape(tensor.shape)
        return matrix.t() if self.flipped else matrix

    @property
    def flipped(self) -> bool:
        """Whether the stored part is (in, out)."""
        return self.transposed or (self.parameter == "weight" and is_transposed(self.module))


def as_matrix(module: nn.Module) -> Tensor:
    """The detached weight of a plain layer as (out, in), as `Weight.matrix` gives it."""
    return _plain(module).matrix()


def write_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Write an (out, in) matrix, laid out as `as_matrix`, into the module's weight in place."""
    _plain(module).write(matrix)


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """The module's input as (rows, in), columns as in `Weight.matrix`: what each weight multiplies.

    Of a convolution with several groups, each has inputs of its own, so none fit: UsageError.
    """
    x = x.detach()
    if not isinstance(module, _ConvNd):
        return x.reshape(-1, x.shape[-1])
    if module.groups != 1:
        raise UsageError("each group of a convolution has inputs of its own")
    if x.dim() == 1 + len(module.kernel_size):
        x = x.unsqueeze(0)
    if isinstance(module, _ConvTransposeNd):
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    windows = windows_of(module, x, module.padding_mode)
    return windows.movedim(1, -1).reshape(-1, module.weight[0].numel())


def windows_of(module: _ConvNd, x: Tensor, mode: str) -> Tensor:
    """What a convolution's taps see: (batch, channels, *places, *taps) of x (batch, channels, ...).

    mode: how x is padded, by the amounts of the module.
    """
    pads: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        pads += _padding(module, axis)
    if any(pads):
        x = nn.functional.pad(x, pads, mode="constant" if mode == "zeros" else mode)
    for axis, taps in enumerate(module.kernel_size):
        reach = (taps - 1) * module.dilation[axis] + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    return x


def _padding(module: _ConvNd, axis: int) -> list[int]:
    """How much is added before and after one axis."""
    if module.padding == "valid":
        return [0, 0]
    if module.padding == "same":  # as torch does it: what is odd goes after
        total = module.dilation[axis] * (module.kernel_size[axis] - 1)
        return [total // 2, total - total // 2]
    amount = module.padding[axis]
    assert isinstance(amount, int)
    return [amount, amount]


def _plain(module: nn.Module) -> Weight:
    if not is_prunable(module):
        raise UsageError(f"{type(module).__name__} is not a layer that Gossamer can prune")
    return Weight(module)
