"""How much of a whole model is packed, and what that holds zeros is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from gossamer.core.matrix import is_prunable
from gossamer.core.result import Coverage, LayerRecord, LeftOut
from gossamer.engine.coverage import nonzeros
from gossamer.nn.packed.base import PackedLayer


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
            reason = (ours and reasons.get(owner)) or _no_kernel(module, name)
            left.append(LeftOut(f"{owner}.{name}".lstrip("."), kind, count, reason))
    for module in root.modules():
        if isinstance(module, PackedLayer):
            size = module.in_features * module.out_features
            total, matrices = total + size, matrices + size
            prunable, packed = prunable + size, packed + size
            nonzero += round(module.density * size)
    return Coverage(total, matrices, prunable, 0, nonzero, packed, tuple(left))


def other_records(root: nn.Module) -> list[LayerRecord]:
    """A record of every matrix that lies in no layer of a packed kind: experts, routers, recurrent
    weights, grouped convolutions. All run dense; `shape` is (rest, last axis)."""
    records = []
    for owner, module, name, parameter in _parameters(root):
        if parameter.dim() < 2 or isinstance(module, nn.Embedding | PackedLayer):
            continue
        if is_prunable(module) and name == "weight":
            continue
        count, kept = parameter.numel(), nonzeros(parameter)
        width = parameter.shape[-1]
        records.append(
            LayerRecord(
                name=owner if name == "weight" else f"{owner}.{name}".lstrip("."),
                shape=(count // max(1, width), width),
                density=kept / count if count else 1.0,
                requested_density=kept / count if count else 1.0,
                reason="no zeros" if kept == count else _no_kernel(module, name),
                dense_bytes=parameter.nbytes,
                sparse_bytes=parameter.nbytes,
            )
        )
    return records


def _no_kernel(module: nn.Module, name: str) -> str:
    return f"no kernel for {name} of {type(module).__name__}"


def _parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter once, with its module and both names."""
    seen: set[int] = set()
    for owner, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not nn.parameter.is_lazy(parameter):
                seen.add(id(parameter))
                yield owner, module, name, parameter
