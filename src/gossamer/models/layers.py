"""Which layers of a model are pruned: a default, widened by `include`, narrowed by `exclude`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.matrix import is_prunable
from gossamer.models.blocks import find_blocks
from gossamer.models.families import is_head


def prunable_layers(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    tied: bool = False,
) -> dict[str, tuple[nn.Module, int | None]]:
    """The layers to prune, as name -> (module, index of its block or None), in module order.

    Default: every Linear, Conv1D or ungrouped Conv2d inside the blocks; in a model without blocks,
    every one that is not named as an output head. Embeddings, heads and the matrices of peft's
    adapters (LoRA and kin) stay dense. `include` adds
    layers and `exclude` removes them, by `fnmatch` patterns on the dotted name (`lm_head`,
    `*.q_proj`). With `tied`, layers that share a weight among themselves are welcome.

    Raises UsageError for a pattern that matches no layer (naming near ones), for a layer whose
    weight is tied to another module's, and when nothing is left to prune.
    """
    blocks = find_blocks(model)
    everywhere = not blocks or isinstance(model, nn.Sequential)
    layers = {name: module for name, module in model.named_modules() if is_prunable(module)}
    adapters = adapter_prefixes(model)
    added = matching(include, layers, model, "include")
    removed = matching(exclude, layers, model, "exclude")
    chosen: dict[str, tuple[nn.Module, int | None]] = {}
    for name, module in layers.items():
        block = _block_of(name, blocks)
        default = not is_head(name) if everywhere else block is not None
        default = default and not isinstance(module, nn.Embedding) and not name.startswith(adapters)
        if (default or name in added) and name not in removed:
            chosen[name] = (module, block)
    if not chosen:
        raise UsageError(
            f"{type(model).__name__} has no layer to prune: Gossamer prunes Linear, Conv1D and "
            "Conv2d with groups=1, less what `exclude` names"
        )
    _check_tied(model, chosen, tied)
    return chosen


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """How the names of the modules begin that peft added beside a layer of the model."""
    return tuple(
        f"{name}.{part}." if name else f"{part}."
        for name, module in model.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
    )


def matching(
    patterns: Sequence[str], layers: dict[str, nn.Module], model: nn.Module, what: str
) -> set[str]:
    """Names of `layers` that match any pattern; UsageError, with near names, where one matches none."""
    if isinstance(patterns, str):
        raise UsageError(f"{what} is a sequence of patterns: write ({patterns!r},)")
    matched: set[str] = set()
    for pattern in patterns:
        names = {name for name in layers if fnmatchcase(name, pattern)}
        if not names:
            raise UsageError(_no_match(pattern, layers, model, what))
        matched |= names
    return matched


def _no_match(pattern: str, layers: dict[str, nn.Module], model: nn.Module, what: str) -> str:
    modules = dict(model.named_modules())
    if pattern in modules:
        kind = type(modules[pattern]).__name__
        inside = f" (to mean the layers inside it write '{pattern}.*')"
        holds = any(name.startswith(pattern + ".") for name in layers)
        return f"{what} {pattern!r} names a {kind}, which cannot be pruned{inside if holds else ''}"
    ends = {name.rsplit(".", 1)[-1]: name for name in layers}
    near = get_close_matches(pattern, layers, n=3, cutoff=0.4)
    near += [ends[end] for end in get_close_matches(pattern, ends, n=3, cutoff=0.6)]
    shown = list(dict.fromkeys(near))[:3] or list(layers)[:3]
    return f"{what} {pattern!r} matches no layer; near names: {', '.join(shown) or 'none'}"


def _block_of(name: str, blocks: Sequence[tuple[str, nn.Module]]) -> int | None:
    for index, (prefix, _) in enumerate(blocks):
        if name == prefix or name.startswith(prefix + "."):
            return index
    return None


def _check_tied(
    model: nn.Module, chosen: dict[str, tuple[nn.Module, int | None]], allowed: bool
) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (module, _) in chosen.items():
        for owner in owners.get(id(module.weight), ()):
            other = owner.rpartition(".")[0]
            if modules[other] is not module and not (allowed and other in chosen):
                raise UsageError(
                    f"{name}: its weight is tied to {other}, so pruning one would prune both; "
                    f"untie them first or leave {name} dense"
                )
