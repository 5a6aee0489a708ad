"""Every prunable layer seen as one (out, in) matrix whose columns are contracted with inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError


def is_prunable(module: nn.Module) -> bool:
    """Linear, Embedding, Conv2d with groups=1 or transformers' Conv1D."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return True
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return is_transposed(module)


_PLAIN = {
    nn.Linear: ("forward",),
    nn.Conv2d: ("forward", "_conv_forward"),
    nn.Embedding: ("forward",),
}
_PLAIN_BY_NAME = frozenset(
    {
        "transformers.pytorch_utils.Conv1D.forward",
        "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
        "timm.layers.linear.Linear.forward",
    }
)
"""Forwards that are the plain product of the stored weight, in libraries that core never imports."""


def why_not_plain(module: nn.Module) -> str | None:
    """Why a prunable module may compute something else than the product with its stored weight.

    None where it is that product: its class's forward is the known one, and its weight is a
    parameter of its own. Otherwise zeros in the stored weight need not be zeros in the forward, and
    no other layer can take its place.
    """
    if "weight" not in module._parameters:
        return _recomputed(module)
    if "forward" in vars(module):
        return "its forward was replaced on the instance, so what it computes is unknown"
    kind = next((kind for kind in _PLAIN if isinstance(module, kind)), None)
    for method in _PLAIN.get(kind, ("forward",)):  # type: ignore[arg-type]
        own = getattr(type(module), method)
        known = kind is not None and own is getattr(kind, method)
        if not known and f"{own.__module__}.{own.__qualname__}" not in _PLAIN_BY_NAME:
            return (
                f"{type(module).__name__} has a forward of its own, so what it computes is unknown"
            )
    return None


def _recomputed(module: nn.Module) -> str:
    """Why a weight that is no parameter cannot be written to, and how to make it one."""
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        kinds = [type(each).__name__.lstrip("_") for each in module.parametrizations["weight"]]  # type: ignore[index]
        return (
            f"its weight is recomputed at every forward ({', '.join(kinds)}); call "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
        )
    if "weight_mask" in module._buffers:
        return (
            "its weight is recomputed at every forward from a mask of torch.nn.utils.prune; call "
            "torch.nn.utils.prune.remove(layer, 'weight') first"
        )
    remedy = "make the weight an ordinary parameter first"
    if "weight_g" in module._parameters:
        remedy = "call torch.nn.utils.remove_weight_norm(layer) first"
    if "weight_orig" in module._parameters:
        remedy = "call torch.nn.utils.remove_spectral_norm(layer) first"
    return f"its weight is recomputed at every forward; {remedy}"


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


def as_matrix(module: nn.Module) -> Tensor:
    """The detached weight as (out, in); of an Embedding as it is, (entries, width).

    Conv2d becomes (out, kh * kw * in_channels), input channels innermost, so that N:M groups run
    along input channels. A view where the layout allows, else a copy: do not write through it.
    """
    weight = _weight(module)
    if isinstance(module, nn.Conv2d):
        return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return weight.t() if is_transposed(module) else weight


@torch.no_grad()
def write_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Write an (out, in) matrix, laid out as `as_matrix`, into the module's weight in place."""
    weight = _weight(module)
    expected = as_matrix(module).shape
    if matrix.shape != expected:
        raise UsageError(f"weight is {tuple(expected)} as a matrix, not {tuple(matrix.shape)}")
    if isinstance(module, nn.Conv2d):
        out, channels, height, width = weight.shape
        weight.copy_(matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2))
    else:
        weight.copy_(matrix.t() if is_transposed(module) else matrix)


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """The module's input as (rows, in), columns as in `as_matrix`: what each weight multiplies."""
    x = x.detach()
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise UsageError("Conv2d calibration needs numeric zero padding")
    if x.dim() == 3:
        x = x.unsqueeze(0)
    patches = nn.functional.unfold(
        x, module.kernel_size, module.dilation, module.padding, module.stride
    )
    batch, _, places = patches.shape
    taps = module.kernel_size[0] * module.kernel_size[1]
    patches = patches.reshape(batch, module.in_channels, taps, places)
    return patches.permute(0, 3, 2, 1).reshape(batch * places, -1)


def _weight(module: nn.Module) -> Tensor:
    if not is_prunable(module):
        raise UsageError(f"{type(module).__name__} is not a layer that Gossamer can prune")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
