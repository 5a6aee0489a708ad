"""How much of a whole model is packed, and what that holds zeros is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from gossamer.core.matrix import is_prunable
from gossamer.core.result import Coverage, LayerRecord, LeftOut
from gossamer.engine.coverage import nonzeros
from gossamer.nn.packed import PackedLayer


def packed_coverage(root: nn.Module, records: Sequence[LayerRecord]) -> Coverage:
    """Of a model whose layers were just packed; `records` say why some stayed dense.

    Weights of a packed layer count as those of the layer that it replaced. O(weights).
    """
    reasons = {record.name: record.reason for record in records if record.reason}
    total = matrices = prunable = nonzero = packed = 0
    left = []
    for owner, module, name, parameter in _parameters(root):
        count, kept = parameter.numel(), nonzeros(parameter)
        total, nonzero = total + count, nonzero + kept
        if parameter.dim() < 2:
            continue
        ours = is_prunable(module) and name.startswith("weight")
        matrices, prunable = matrices + count, prunable + (count if ours else 0)
        if kept < count:
            kind = type(module).__name__
            reason = (ours and reasons.get(owner)) or f"no kernel for {name} of {kind}"
            left.append(LeftOut(f"{owner}.{name}".lstrip("."), kind, count, reason))
    for module in root.modules():
        if isinstance(module, PackedLayer):
            size = module.in_features * module.out_features
            total, matrices = total + size, matrices + size
            prunable, packed = prunable + size, packed + size
            nonzero += round(module.density * size)
    return Coverage(total, matrices, prunable, 0, nonzero, packed, tuple(left))


def _parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter once, with its module and both names."""
    seen: set[int] = set()
    for owner, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not nn.parameter.is_lazy(parameter):
                seen.add(id(parameter))
                yield owner, module, name, parameter
