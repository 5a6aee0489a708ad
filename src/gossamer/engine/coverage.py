"""How much of a model a call reached, counted on its weights as they are after the call."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from gossamer.core.matrix import Weight
from gossamer.core.result import Coverage, LeftOut
from gossamer.models.families import is_router
from gossamer.models.layers import EXPECTED

_TABLE = re.compile(r"embed|token|pos|bias|relative|table|scale|_log$", re.IGNORECASE)
_LOG = logging.getLogger("gossamer")


def coverage_of(
    model: nn.Module,
    weights: Mapping[str, Weight],
    pruned: Collection[str],
    left: Mapping[str, str],
) -> Coverage:
    """What part of a model was pruned, and every matrix that was not, with the reason.

    weights: every matrix that Gossamer can prune. left: why those outside of `pruned` were not.
    """
    parts: dict[int, list[str]] = {}
    for name, weight in weights.items():
        parts.setdefault(id(getattr(weight.module, weight.parameter)), []).append(name)
    owners = _owners(model)
    matrices = prunable = 0
    out: list[LeftOut] = []
    for path, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        matrices += parameter.numel()
        kind = type(owners[path]).__name__
        names = parts.get(id(parameter), [])
        prunable += parameter.numel() if names else 0
        if not names:
            reason = _other(model, path, parameter, kind, left)
            out.append(LeftOut(path, kind, parameter.numel(), reason))
        elif weights[names[0]].part is None:  # tied ones have several names
            if not any(name in pruned for name in names):
                out.append(LeftOut(path, kind, parameter.numel(), left[names[0]]))
        else:
            out += [
                LeftOut(name, kind, weights[name].tensor.numel(), left[name])
                for name in names
                if name not in pruned
            ]
    return Coverage(
        total=sum(p.numel() for p in model.parameters()),
        matrices=matrices,
        prunable=prunable,
        pruned=sum(weights[name].tensor.numel() for name in pruned),
        nonzero=sum(nonzeros(p.detach()) for p in model.parameters()),
        left_out=tuple(out),
    )


def nonzeros(tensor: Tensor) -> int:
    """How many entries are not zero; of a dtype that cannot be compared, or without values, all."""
    if tensor.device.type == "meta":
        return tensor.numel()
    if tensor.is_floating_point() and tensor.element_size() == 1:  # torch has no count of these
        tensor = tensor.float()
    try:
        return int(torch.count_nonzero(tensor))
    except (NotImplementedError, RuntimeError):
        return tensor.numel()


def warn(coverage: Coverage) -> None:
    """Log what a user may not expect: little was pruned, or weights were left out for a reason of
    their own."""
    surprising = [each for each in coverage.left_out if each.reason not in EXPECTED.values()]
    if coverage.pruned_share >= 0.5 and not surprising:
        return
    told = [f"{each.name} ({each.reason})" for each in surprising[:3]]
    more = f" and {len(surprising) - 3} more" if len(surprising) > 3 else ""
    _LOG.warning(
        "%.0f%% of the matrix weights were pruned%s; result.coverage.left_out names the rest",
        100 * coverage.pruned_share,
        f"; left dense: {', '.join(told)}{more}" if told else "",
    )


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name in module._parameters
    }


def _other(
    model: nn.Module, path: str, parameter: Tensor, kind: str, left: Mapping[str, str]
) -> str:
    """Why a matrix that is of no kind that Gossamer prunes stays dense."""
    owner, _, name = path.rpartition(".")
    layer, _, computed = owner.partition(".parametrizations.")
    if computed and (told := left.get(layer) or left.get(f"{layer}.{computed}")):
        return told
    if name.endswith(("_g", "_v", "_orig")) and owner in left:
        return left[owner]
    if is_router(model, owner, model.get_submodule(owner)):
        return EXPECTED["router"]
    if isinstance(model.get_submodule(owner), nn.EmbeddingBag):
        return EXPECTED["embedding"]
    if parameter.numel() == max(parameter.shape) or _TABLE.search(name):
        return EXPECTED["table"]
    return f"a parameter of {kind}, whose use in products Gossamer does not know"
