"""What the sweep looks at, measured from the weights themselves and never from a result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rows import Wrong
from torch import Tensor, nn

LARGEST_GAP = 1e-4


def numbers(output: Any, name: str = "out") -> dict[str, Tensor]:
    """Every floating tensor of a model's output, by its place in it; caches left out."""
    if isinstance(output, Tensor):
        return {name: output.detach()} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        parts = {str(key): value for key, value in output.items()}
    elif isinstance(output, tuple | list):
        parts = {str(index): value for index, value in enumerate(output)}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in parts.items():
        if "past_key" not in key and "cache" not in key:
            found |= numbers(value, f"{name}.{key}")
    return found


def run(model: nn.Module, batches: list[Any], grad: bool = False) -> dict[str, Tensor]:
    """The outputs of all batches."""
    found: dict[str, Tensor] = {}
    with torch.set_grad_enabled(grad):
        for index, batch in enumerate(batches):
            output = model(**batch) if isinstance(batch, Mapping) else model(batch)
            found |= numbers(output, f"batch{index}")
    if not found:
        raise Wrong("the model gave no numbers")
    return found


def gap(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], limit: float) -> float:
    """The largest difference over the largest output; raises Wrong above `limit`."""
    if found.keys() != wanted.keys():
        raise Wrong(f"outputs {sorted(found)} instead of {sorted(wanted)}")
    worst = 0.0
    for name, right in wanted.items():
        left = found[name]
        if left.shape != right.shape:
            raise Wrong(f"{name}: {tuple(left.shape)} instead of {tuple(right.shape)}")
        if bool(left.isnan().any()) and not bool(right.isnan().any()):
            raise Wrong(f"{name}: NaN")
        scale = max(float(right.abs().max()), 1e-12) if right.numel() else 1.0
        off = float((left - right).abs().max()) / scale if right.numel() else 0.0
        worst = max(worst, off)
        if not off <= limit:
            raise Wrong(f"{name} is off by {off:.1e} of its largest value")
    return worst


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Weights, buffers, training flags, hooks and gradients' flags as they are."""
    return {
        "state": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "buffers": {k: v.detach().clone() for k, v in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: hooks(module) for name, module in model.named_modules()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def hooks(module: nn.Module) -> tuple[int, ...]:
    """How many hooks of each sort a module carries, and whether its forward is its class's."""
    sorts = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (*(len(getattr(module, sort)) for sort in sorts), "forward" in vars(module))


def restored(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Raise Wrong where a call left flags, hooks or buffers other than it found them."""
    after = snapshot(model)
    for what in ("training", "hooks", "grad"):
        for name, value in before[what].items():
            if after[what].get(name) != value:
                raise Wrong(
                    f"{what} of {name or 'the model'}: {after[what].get(name)}, not {value}"
                )
    for name, value in before["buffers"].items():
        if not same(after["buffers"][name], value):
            raise Wrong(f"buffer {name} changed")


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have equal bits, NaN included."""
    return left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())


def refused_well(model: nn.Module, before: Mapping[str, Any], error: str) -> None:
    """Raise Wrong unless every tensor is as it was and the error says which part is meant."""
    for name, value in model.state_dict().items():
        if not same(value, before["state"][name]):
            raise Wrong(f"{name} changed before the refusal")
    restored(model, before)
    names = {name for name, _ in model.named_modules() if name} | {type(model).__name__}
    if not any(name in error for name in names):
        raise Wrong("the error names no layer")


def weight_of(model: nn.Module, name: str) -> tuple[str, Tensor]:
    """The parameter that a result's name means, and the part of it as a view.

    A layer's name means its weight; a parameter's own name may go on with the index of an expert or
    with the letter of a third of an `in_proj_weight`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in (name, f"{name}.weight"):
        if key in parameters:
            return key, parameters[key].detach()
    key, _, part = name.rpartition(".")
    if key in parameters:
        whole = parameters[key].detach()
        return key, whole[int(part)] if part.isdigit() else whole.chunk(3)["qkv".index(part)]
    raise Wrong(f"{name} names no parameter of the model")


def pruned_weights(
    model: nn.Module, before: Mapping[str, Any], result: Any, pattern: str, density: float
) -> None:
    """The result's claims against the weights: zeros, groups, densities, all others untouched."""
    kept = total = 0
    for record in result.layers:
        weight, support = weight_of(model, record.name)[1], result.supports[record.name]
        nonzero, size = int(weight.count_nonzero()), weight.numel()
        kept, total = kept + nonzero, total + size
        if abs(record.density - nonzero / size) > 1e-6:
            raise Wrong(f"{record.name}: told {record.density:.4f}, kept {nonzero / size:.4f}")
        if nonzero == size:
            raise Wrong(f"{record.name}: pruned in the result, without a zero in its weight")
        if pattern == "2:4":
            groups_of_four(model, record.name, weight)
        if int(support.mask.numel()) != size or nonzero > int(support.mask.sum()):
            raise Wrong(f"{record.name}: its support is not that of its weight")
    if {record.name for record in result.layers} != set(result.supports):
        raise Wrong("the records and the supports name other layers")
    if abs(result.measured_density - kept / total) > 1e-6:
        raise Wrong(f"told {result.measured_density:.4f}, the weights keep {kept / total:.4f}")
    if kept / total > density + 0.02:
        raise Wrong(f"asked for {density}, the weights keep {kept / total:.4f}")
    untouched(model, before, result.supports)


def untouched(model: nn.Module, before: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise Wrong where a weight changed that no name covers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen: dict[int, Tensor] = {}
    for name in names:
        key, part = weight_of(model, name)
        whole = parameters[key]
        covered = chosen.setdefault(id(whole), torch.zeros(whole.shape, dtype=torch.bool))
        covered.as_strided(part.shape, part.stride(), part.storage_offset()).fill_(True)
    for name, value in model.state_dict().items():
        changed = value.nan_to_num() != before["state"][name].nan_to_num()
        covered = chosen.get(id(parameters.get(name)), torch.tensor(False))
        if bool((changed & ~covered).any()):
            raise Wrong(f"{name} changed, although the result does not name it")


def groups_of_four(model: nn.Module, name: str, weight: Tensor) -> None:
    """At most two of every four neighbouring inputs; for kinds unknown here, along any axis.

    A convolution's inputs run over its channels first, then over its window.
    """
    module = dict(model.named_modules()).get(name)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        ways = [weight.movedim(1, -1).flatten(1)]
    elif isinstance(module, nn.Linear | nn.Embedding) or "in_proj_weight" in name:
        ways = [weight]
    elif type(module).__name__ == "Conv1D":
        ways = [weight.t()]
    else:
        ways = [weight.movedim(axis, -1) for axis in range(weight.dim())]
    for way in ways:
        if way.shape[-1] % 4 == 0 and bool(((way.reshape(-1, 4) != 0).sum(1) <= 2).all()):
            return
    raise Wrong(f"{name}: a group of four keeps more than two")


def coverage(model: nn.Module, result: Any) -> tuple[float, dict[str, dict[str, float]]]:
    """The share of matrix weights that was pruned, and the shares left out by kind and reason.

    Raises Wrong where the result's counts are not those of the parameters.
    """
    parameters = dict(model.named_parameters())
    matrices = sum(p.numel() for p in parameters.values() if p.dim() >= 2)
    views = {v.data_ptr(): v for v in (weight_of(model, name)[1] for name in result.supports)}
    pruned = sum(view.numel() for view in views.values())
    told = result.coverage
    counted = {
        "total": sum(p.numel() for p in parameters.values()),
        "matrices": matrices,
        "pruned": pruned,
        "nonzero": sum(int(p.count_nonzero()) for p in parameters.values()),
    }
    for what, value in counted.items():
        if getattr(told, what) != value:
            raise Wrong(f"coverage.{what}: told {getattr(told, what)}, counted {value}")
    left = sum(item.count for item in told.left_out)
    if pruned + left != matrices:
        raise Wrong(f"coverage: {pruned} pruned and {left} left out of {matrices}")
    silent = [item.name for item in told.left_out if not item.reason]
    if silent:
        raise Wrong(f"coverage: no reason for {silent[0]}")
    shares: dict[str, dict[str, float]] = {}
    for item in told.left_out:
        of_kind = shares.setdefault(item.kind, {})
        of_kind[item.reason] = of_kind.get(item.reason, 0.0) + item.count / matrices
    return pruned / matrices, shares
