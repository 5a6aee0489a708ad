"""Which weights of a model are pruned: a default, widened by `include`, narrowed by `exclude`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gossamer.core.errors import UsageError
from gossamer.core.matrix import Weight, own_forward, why_not_plain
from gossamer.models.blocks import find_blocks
from gossamer.models.families import is_head, is_input_embedding, is_router
from gossamer.models.weights import find_weights

EXPECTED = {
    "embedding": "an embedding looks rows up and multiplies nothing",
    "head": "an output head",
    "router": "a router, which chooses experts",
    "adapter": "part of an adapter of peft",
    "inputs": "an embedding of patches or positions",
    "depthwise": "a depthwise convolution, with few weights",
    "table": "by its shape or name no matrix but a vector, or a table of tokens, places or biases",
    "exclude": "named by exclude",
}
"""Reasons to leave a weight dense that nobody wonders about. `include` overrides them."""


@dataclass(frozen=True)
class Choice:
    """What is to be pruned, in module order, and why the other prunable weights are not.

    blocks: the index of a weight's block, None outside of blocks. named: what `include` named.
    """

    weights: dict[str, Weight]
    blocks: dict[str, int | None]
    left: dict[str, str]
    named: frozenset[str]


def choose_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Choice:
    """The weights to prune: all that Gossamer can prune, less what `EXPECTED` lists.

    `include` adds weights and `exclude` removes them, by `fnmatch` patterns on the dotted name
    (`lm_head`, `*.q_proj`, `*.experts.down_proj.*`). Weights that are tied to others, and layers
    whose forward is their own, are left out too, unless they are named.

    Raises UsageError for a pattern that matches nothing (naming near ones), for a weight that is
    recomputed at every forward, for one that is tied and named, and when nothing is left.
    """
    weights = find_weights(model)
    names = _names(model, weights)
    added = matching(include, names, model, "include")
    removed = matching(exclude, names, model, "exclude")
    blocks = _blocks_of(model, weights)
    ties = _ties(model, weights)
    expected = _expected(model, weights, blocks)
    left: dict[str, str] = {}
    for name, weight in weights.items():
        reason = expected.get(name) if name not in added else None
        if name in removed:
            reason = EXPECTED["exclude"]
        if reason is None:
            reason = _refusal(name, weight, name in added, ties)
        if reason is not None:
            left[name] = reason
    chosen = {name: weight for name, weight in weights.items() if name not in left}
    if not chosen:
        raise UsageError(nothing_to_prune(model, left))
    return Choice(chosen, blocks, left, frozenset(added & set(chosen)))


def prunable_layers(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    tied: bool = False,
) -> dict[str, tuple[nn.Module, int | None]]:
    """The layers with one plain weight to prune, as name -> (module, index of its block or None).

    These are Linear, Conv1D, ungrouped Conv2d and, named in, Embedding, by the default of
    `choose_weights`; a forward of their own does not matter here. With `tied`, layers that share a
    weight among themselves are welcome.

    Raises UsageError as `choose_weights` does, and for any weight tied to another module's.
    """
    weights = {name: weight for name, weight in find_weights(model).items() if weight.plain}
    names = _names(model, weights)
    added = matching(include, names, model, "include")
    removed = matching(exclude, names, model, "exclude")
    blocks = _blocks_of(model, weights)
    expected = _expected(model, weights, blocks)
    chosen = {
        name: (weight.module, blocks[name])
        for name, weight in weights.items()
        if (name in added or name not in expected) and name not in removed
    }
    if not chosen:
        raise UsageError(nothing_to_prune(model, expected))
    ties = _ties(model, weights)
    for name, (module, _) in chosen.items():
        if "weight" not in module._parameters:
            raise UsageError(f"{name}: {why_not_plain(module)}")
        for other in ties.get(name, ()):
            if not (tied and other in chosen):
                raise UsageError(_tied(name, other))
    return chosen


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """How the names of the modules begin that peft added beside a layer of the model."""
    return tuple(
        f"{name}.{part}." if name else f"{part}."
        for name, module in model.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
    )


def nothing_to_prune(model: nn.Module, left: Mapping[str, str]) -> str:
    """What is wrong with a model, or a choice, that leaves nothing to prune."""
    said = f"{type(model).__name__} has no layer to prune"
    if not left:
        return (
            f"{said}: Gossamer prunes Linear, Conv1D, Bilinear, convolutions, the weights of "
            "MultiheadAttention and recurrent layers, and experts in 3-D parameters"
        )
    name, reason = min(left.items(), key=lambda item: item[1] in EXPECTED.values())
    others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    return f"{said}: {name or 'the model itself'} is left out: {reason}{others}"


def default_reasons(model: nn.Module) -> dict[str, str]:
    """Why weights stay dense unless they are named, by name, for those that do."""
    weights = find_weights(model)
    return _expected(model, weights, _blocks_of(model, weights))


def _expected(
    model: nn.Module, weights: Mapping[str, Weight], blocks: Mapping[str, int | None]
) -> dict[str, str]:
    """Why weights stay dense by default, by name, for those that do."""
    adapters = adapter_prefixes(model)
    head = _output_embeddings(model)
    found = {}
    for name, weight in weights.items():
        module = weight.module
        inside = blocks[name] is not None and not isinstance(model, nn.Sequential)
        if isinstance(module, nn.Embedding):
            found[name] = EXPECTED["embedding"]
        elif adapters and name.startswith(adapters):
            found[name] = EXPECTED["adapter"]
        elif module is head or (is_head(name) and not inside):
            found[name] = EXPECTED["head"]
        elif is_input_embedding(name, module):
            found[name] = EXPECTED["inputs"]
        elif weight.part is None and is_router(model, name, module):
            found[name] = EXPECTED["router"]
        elif isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels:
            found[name] = EXPECTED["depthwise"]
    return found


def _refusal(
    name: str, weight: Weight, named: bool, ties: Mapping[str, Sequence[str]]
) -> str | None:
    """Why a weight cannot be pruned on its own; raises UsageError where that must not go on."""
    if weight.parameter not in weight.module._parameters:
        raise UsageError(
            f"{name}: {why_not_plain(weight.module, weight.parameter)}, or exclude this layer"
        )
    for other in ties.get(name, ()):
        if named:
            raise UsageError(_tied(name, other))
        return f"its weight is tied to {other}"
    if not named and not isinstance(weight.part, int):
        return own_forward(weight.module)
    return None


def _tied(name: str, other: str) -> str:
    return (
        f"{name}: its weight is tied to {other}, so pruning one would prune both; "
        f"untie them first or leave {name} dense"
    )


def _ties(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, list[str]]:
    """By name, the other modules whose parameters share memory with a weight's parameter."""
    cluster = _clusters(model)
    members: dict[int, dict[int, str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                members.setdefault(cluster[id(parameter)], {})[id(module)] = path
    ties = {}
    for name, weight in weights.items():
        parameter = weight.module._parameters.get(weight.parameter)
        sharing = members[cluster[id(parameter)]] if parameter is not None else {}
        ties[name] = [path for key, path in sharing.items() if key != id(weight.module)]
    return ties


def _clusters(model: nn.Module) -> dict[int, int]:
    """By its id, which parameters overlap in memory: those with the same number."""
    spans: list[tuple[int, int, int]] = []
    found: dict[int, int] = {}
    for parameter in model.parameters():
        found[id(parameter)] = len(found)
        if nn.parameter.is_lazy(parameter) or is_traceable_wrapper_subclass(parameter):
            continue
        if parameter.device.type == "meta" or not parameter.numel():
            continue
        steps = zip(parameter.shape, parameter.stride(), strict=True)
        start = parameter.data_ptr()
        stop = (
            start + (1 + sum((n - 1) * int(step) for n, step in steps)) * parameter.element_size()
        )
        spans.append((start, stop, id(parameter)))
    end, first = 0, 0
    for start, stop, key in sorted(spans):
        if start >= end:
            first = found[key]
        found[key] = first
        end = max(end, stop)
    return found


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a model of transformers, as the model itself tells."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _names(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Every name of every weight, to the one it goes by: modules may have several."""
    aliases: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(path)
    names = {}
    for name, weight in weights.items():
        paths = aliases[id(weight.module)]
        end = name.removeprefix(paths[0])
        names.update({path + end: name for path in paths})
    return names


def _blocks_of(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, int | None]:
    """The block of every weight; None outside of blocks, and for one that several blocks share."""
    blocks = find_blocks(model)
    uses = Counter(id(module) for _, block in blocks for module in set(block.modules()))
    owner = {
        id(module): index for index, (_, block) in enumerate(blocks) for module in block.modules()
    }
    distinct = len({id(block) for _, block in blocks}) == len(blocks)
    return {
        name: owner.get(id(weight.module)) if uses[id(weight.module)] == 1 or not distinct else None
        for name, weight in weights.items()
    }


def matching(
    patterns: Sequence[str], names: Mapping[str, str], model: nn.Module, what: str
) -> set[str]:
    """The names that patterns of `include` or `exclude` mean; `names` maps aliases to them.

    Raises UsageError for a pattern that matches nothing, naming near ones.
    """
    if isinstance(patterns, str):
        raise UsageError(f"{what} is a sequence of patterns: write ({patterns!r},)")
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for alias, name in names.items() if fnmatchcase(alias, pattern)}
        if not found:
            raise UsageError(_no_match(pattern, names, model, what))
        matched |= found
    return matched


def _no_match(pattern: str, names: Iterable[str], model: nn.Module, what: str) -> str:
    modules = dict(model.named_modules())
    names = list(names)
    if pattern in modules:
        kind = type(modules[pattern]).__name__
        inside = f" (to mean the layers inside it write '{pattern}.*')"
        holds = any(name.startswith(pattern + ".") for name in names)
        return f"{what} {pattern!r} names a {kind}, which cannot be pruned{inside if holds else ''}"
    ends = {name.rsplit(".", 1)[-1]: name for name in names}
    near = get_close_matches(pattern, names, n=3, cutoff=0.4)
    near += [ends[end] for end in get_close_matches(pattern, ends, n=3, cutoff=0.6)]
    shown = list(dict.fromkeys(near))[:3] or list(names)[:3]
    return f"{what} {pattern!r} matches no layer; near names: {', '.join(shown) or 'none'}"
