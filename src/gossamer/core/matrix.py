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
