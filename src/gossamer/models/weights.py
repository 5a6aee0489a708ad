"""Every matrix of a model that Gossamer can prune, by name; and what its other matrices are."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gossamer.core.matrix import Weight, is_prunable

_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_INNER = re.compile(r"down|w2|wo$|output", re.IGNORECASE)
"""Names of the matrices that lead out of an expert; the others lead in."""


def find_weights(model: nn.Module) -> dict[str, Weight]:
    """Every matrix that Gossamer can prune, in module order, a shared module once.

    A layer with one weight has its own dotted name: Linear, Conv1D, Embedding, Bilinear and every
    convolution. Others are named by their parameter: `rnn.weight_ih_l0`, `attn.in_proj_weight.q`,
    `mlp.experts.down_proj.3` for the fourth expert of a 3-D parameter.
    """
    found: dict[str, Weight] = {}
    for name, module in model.named_modules():
        for part, weight in _weights_in(name, module):
            found[f"{name}.{part}" if name and part else name or part] = weight
    return found


def _weights_in(path: str, module: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The module's own weights, each with the part of its name after the module's."""
    if is_prunable(module) or isinstance(module, (_ConvNd, nn.Bilinear)):
        yield "", Weight(module)
    elif isinstance(module, nn.MultiheadAttention):
        yield from _attention(module)
    elif isinstance(module, nn.RNNBase):
        for name in module._flat_weights_names:
            if name.startswith("weight_"):
                yield name, Weight(module, name)
    elif isinstance(module, nn.RNNCellBase):
        for name in ("weight_ih", "weight_hh"):
            yield name, Weight(module, name)
    elif not isinstance(module, nn.utils.parametrize.ParametrizationList):
        yield from _experts(path, module)


def _attention(module: nn.MultiheadAttention) -> Iterator[tuple[str, Weight]]:
    """Query, key and value apart: in cross attention they have different inputs."""
    if not module._qkv_same_embed_dim:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield name, Weight(module, name)
        return
    width = module.embed_dim
    for index, letter in enumerate("qkv"):
        rows = slice(index * width, (index + 1) * width)
        yield f"in_proj_weight.{letter}", Weight(module, "in_proj_weight", rows)


def _experts(path: str, module: nn.Module) -> Iterator[tuple[str, Weight]]:
    """One matrix for each expert of every 3-D parameter that holds experts."""
    names = [*module._parameters, *getattr(module, "parametrizations", ())]
    stacks = {name: getattr(module, name) for name in names}
    stacks = {n: p for n, p in stacks.items() if isinstance(p, Tensor) and _is_stack(n, p)}
    owner = f"{path.rpartition('.')[2]} {type(module).__name__}"
    for name, stack in stacks.items():
        if not _EXPERTS.search(f"{owner} {name}"):
            continue
        flipped = stored_transposed(module, stacks)
        for index in range(stack.shape[0]):
            yield f"{name}.{index}", Weight(module, name, index, flipped)


def _is_stack(name: str, parameter: Tensor) -> bool:
    """Whether a parameter holds matrices side by side, rather than biases or scales."""
    if nn.parameter.is_lazy(parameter) or parameter.dim() != 3:
        return False
    return min(parameter.shape[1:]) > 1 and not re.search("bias|scale", name)


def stored_transposed(module: nn.Module, stacks: dict[str, Tensor]) -> bool:
    """Whether experts lie as (experts, in, out): transformers says so; else their shapes may.

    What leads in and what leads out of an expert share the inner width: (inner, in) and
    (out, inner) as usual, (in, inner) and (inner, out) transposed. A gate beside it doubles one.
    """
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    leads_out = next((p for name, p in stacks.items() if _INNER.search(name)), None)
    leads_in = next((p for name, p in stacks.items() if not _INNER.search(name)), None)
    if leads_out is None or leads_in is None:
        return False
    usual = leads_in.shape[2] == leads_out.shape[1] and not leads_in.shape[1] % leads_out.shape[2]
    flipped = leads_in.shape[1] == leads_out.shape[2] and not leads_in.shape[2] % leads_out.shape[1]
    return flipped and not usual
