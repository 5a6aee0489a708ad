"""LoRA on a sparse model: the zeros of the base hold while it trains and after merging.

Plain LoRA adds a dense product B A to each weight, so merging it fills every zero. Dropping what
fell outside the support after training would restore the zeros but change what the model learned.
`sparse_lora` therefore masks the product in every forward pass of the training, and `merge_sparse`
then merges exactly that function: the merged model is as sparse as the base and computes what was
trained, up to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.core.result import PruneResult
from gossamer.core.support import Support
from gossamer.engine.hooks import adjust_outputs
from gossamer.engine.train.guard import fingerprint
from gossamer.engine.train.layers import TrainedLayer

try:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
except ImportError:
    raise MissingExtra("peft", "peft") from None

Masks: TypeAlias = PruneResult | Mapping[str, Tensor | Support]
_REWRITERS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisers that take the adapter's product out of the base weight, and so fill its zeros."""
_NEARLY = 0.99
"""From here on a weight counts as dense where zeros would be refused: a padding entry, chance."""
_INSIDE = "_gossamer_inside"
"""Where a layer keeps what its adapters were when `sparse_lora` was last open."""


@dataclass(frozen=True, eq=False)
class _Place:
    """A layer with an adapter (or a trained copy, of modules_to_save) over a sparse weight."""

    layer: Any
    base: nn.Module
    before: Tensor
    mask: Tensor


@contextmanager
def sparse_lora(model: PeftModel, masks: Masks | None = None) -> Iterator[dict[str, Tensor]]:
    """While open, each adapter acts only where its base weight is not zero; yields those masks.

    masks: the supports of `gs.prune` or of a sparse run, by the names that the layers had before
    peft, or boolean tensors of the weights' shapes; without it, where the base weights are not
    zero. Needed for initialisers that rewrite the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).

    Masks have the base weights' shapes and are by the names of the adapted layers. A forward pass
    costs one further dense product for each adapted sparse layer. Open it again to evaluate the
    adapter after training, or merge.

    Raises UsageError for adapters other than LoRA and AdaLoRA, for dropout, DoRA and other
    variants, whose product cannot be masked exactly, for trained copies (`modules_to_save`) of
    sparse layers, for adapters that are merged already, and when no adapted layer has zeros.
    """
    places = _places(model, masks)
    for name, place in places.items():
        _check_maskable(name, place.layer)
    for place in places.values():
        setattr(place.layer, _INSIDE, None)
    try:
        adjust = [(place.layer, _inside(place)) for place in places.values()]
        with adjust_outputs(adjust, _check_call):
            yield {name: place.mask for name, place in places.items()}
    finally:
        for place in places.values():
            setattr(place.layer, _INSIDE, _adapters(place.layer))


def merge_sparse(model: PeftModel, masks: Masks | None = None) -> nn.Module:
    """The base model with the adapters merged inside its supports; what was zero is exactly zero.

    masks: as in `sparse_lora`. An adapter trained in `sparse_lora` merges without loss. Of any
    other, of other kinds too, the part outside the supports is dropped, with a warning that says
    how much of it. Needs a copy of the adapted weights meanwhile. Raises UsageError, nothing
    changed, for merged adapters, and where it cannot tell the zeros.
    """
    places = _places(model, masks)
    merge: Any = getattr(model, "merge_and_unload", None)
    if merge is None:
        raise UsageError(f"{type(model).__name__} has no adapters that can be merged")
    inside = [_trained_inside(place.layer) for place in places.values()]
    olds = [place.before.clone() for place in places.values()]
    merged: nn.Module = merge()
    shares = {}
    with torch.no_grad():
        for (name, place), old, known in zip(places.items(), olds, inside, strict=True):
            weight: Any = place.base.weight
            if not known:
                shares[name] = _dropped(weight, old, place.mask)
            weight.masked_fill_(~place.mask, 0)
    _say_dropped(shares)
    return merged


def _places(model: PeftModel, masks: Masks | None) -> dict[str, _Place]:
    """The adapted layers over weights with zeros, by name; changes nothing."""
    given = _given(masks)
    if not given:
        _check_initialisers(model)
    found, used = {}, False
    for name, layer, base, old in _adapted(model):
        weight = getattr(old, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            continue
        mask = _given_mask(name, old, given)
        used = used or mask is not None
        if mask is None:
            mask = weight.detach() != 0
        if isinstance(layer, ModulesToSaveWrapper) or isinstance(old, nn.Embedding):
            if float(mask.float().mean()) > _NEARLY:
                continue
            if isinstance(old, nn.Embedding):
                raise UsageError(f"{name}: adapters of sparse embeddings are not supported")
        if not bool(mask.all()):
            found[name] = _Place(layer, base, weight.detach(), mask)
    if given and not used:
        raise UsageError(f"masks names no layer with an adapter, but {', '.join(list(given)[:3])}")
    if not found:
        raise UsageError("no layer with an adapter has zeros; prune the model before adding LoRA")
    return found


def _adapted(model: PeftModel) -> Iterator[tuple[str, Any, nn.Module, nn.Module]]:
    """(name, layer, the module that is left after merging, the one from before training) of every
    layer with an adapter, and of the layers inside trained copies."""
    for name, layer in model.named_modules():
        if isinstance(layer, ModulesToSaveWrapper) and layer.active_adapters:
            copy = layer.modules_to_save[layer.active_adapters[0]]
            for part, module in layer.original_module.named_modules():
                yield f"{name}.{part}".rstrip("."), layer, copy.get_submodule(part), module
        elif isinstance(layer, BaseTunerLayer) and not name.endswith("token_adapter"):
            if layer.merged:
                raise UsageError(f"{name}: its adapter is merged already, so the zeros are lost; "
                                 "call unmerge_adapter() first")  # fmt: skip
            base = layer.get_base_layer()
            _check_weights(name, layer, base)
            yield name, layer, base, base


def _check_initialisers(model: PeftModel) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        how = getattr(config, "init_lora_weights", True)
        if isinstance(how, str) and how.lower().startswith(_REWRITERS):
            raise UsageError(
                f"adapter {name!r}: init_lora_weights={how!r} takes the adapter out of the base "
                "weights, which fills their zeros; pass masks=, the result of gs.prune from before "
                "get_peft_model, or choose another initialiser (True, 'gaussian', 'orthogonal')"
            )


def _check_weights(name: str, layer: Any, base: nn.Module) -> None:
    """Raise UsageError for zeros in parameters that no mask of `weight` would hold."""
    if hasattr(layer, "get_param"):
        weights = {layer.parameter_name: layer.get_param()}
    elif isinstance(getattr(base, "weight", None), Tensor):
        return
    else:
        weights = {key: p for key, p in base.named_parameters(recurse=False) if p.dim() > 1}
    for key, weight in weights.items():
        if weight.is_floating_point() and float((weight != 0).float().mean()) <= _NEARLY:
            raise UsageError(
                f"{name}: its adapter acts on {key} of {type(base).__name__}, whose zeros cannot "
                "be held; adapt Linear, Conv1D or Conv2d layers by target_modules"
            )


def _check_maskable(name: str, layer: Any) -> None:
    if isinstance(layer, ModulesToSaveWrapper):
        raise UsageError(
            f"{name}: modules_to_save trains a dense copy of a sparse layer; take it out of "
            "modules_to_save and adapt it by LoRA, or leave it as it is"
        )
    if not isinstance(layer, LoraLayer):
        raise UsageError(
            f"{name}: {type(layer).__module__.split('.')[-2]} is not LoRA, and what it does to a "
            "sparse weight cannot be masked; configure plain LoRA"
        )
    for adapter in layer.active_adapters:
        dropout = dict(layer.lora_dropout.items()).get(adapter)
        if getattr(dropout, "p", 0) or adapter in layer.lora_variant:
            raise UsageError(
                f"{name}: its adapter uses dropout, DoRA or another variant of LoRA, which "
                "cannot be masked; configure plain LoRA with lora_dropout=0"
            )


def _given(masks: Any) -> Mapping[str, Tensor | Support]:
    if masks is None:
        return {}
    if isinstance(masks, PruneResult):
        masks = masks.supports
    if not isinstance(masks, Mapping) or not masks:
        raise UsageError("masks is the result of gs.prune, or supports or masks by layer name")
    return masks


def _given_mask(name: str, base: nn.Module, given: Mapping[str, Tensor | Support]) -> Tensor | None:
    """The mask that was given for a layer, of its weight's shape."""
    weight: Any = base.weight
    short = name.removeprefix("base_model.model.")
    for key in (short, name, f"{name}.base_layer"):
        if key not in given:
            continue
        mask = given[key]
        if isinstance(mask, Support):
            mask = TrainedLayer(key, base, weight, None).tensor(mask.mask)
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise UsageError(f"{key}: the mask is {tuple(mask.shape)} of {mask.dtype}, not "
                             f"{tuple(weight.shape)} of torch.bool")  # fmt: skip
        return mask.to(weight.device)
    return None


def _check_call(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise UsageError("sparse_lora cannot follow a batch that mixes adapters; run one adapter "
                         "at a time")  # fmt: skip


def _inside(place: _Place) -> Callable[[Tensor, Tensor], Tensor]:
    """Takes out of the layer's output what its adapters add outside the mask."""
    layer, base, mask = place.layer, place.base, place.mask
    leaks = bool(place.before.masked_fill(mask, 0).any())

    def adjust(x: Tensor, output: Tensor) -> Tensor:
        adapters = [x for x in layer.active_adapters if x in layer.lora_A]
        if layer.disable_adapters or layer.merged or not adapters:
            return output
        weight = sum(layer.get_delta_weight(adapter) for adapter in adapters)
        assert isinstance(weight, Tensor)
        outside = (weight + place.before if leaks else weight).masked_fill(mask, 0)
        parts = {"weight": outside}
        if isinstance(bias := getattr(base, "bias", None), Tensor):
            parts["bias"] = torch.zeros_like(bias, dtype=outside.dtype)
        extra = torch.func.functional_call(base, parts, (x.to(outside.dtype),))
        return output - extra.to(output.dtype)

    return adjust


def _adapters(layer: Any) -> list[tuple[float, float]]:
    """What the adapters of a layer are, to see whether they change."""
    base = {id(p) for p in layer.get_base_layer().parameters()}
    return fingerprint([p for p in layer.parameters() if id(p) not in base])


def _trained_inside(layer: Any) -> bool:
    """Whether the adapters are as `sparse_lora` left them, or it is open."""
    if not hasattr(layer, _INSIDE):
        return False
    seen = getattr(layer, _INSIDE)
    return seen is None or bool(seen == _adapters(layer))


def _dropped(weight: Tensor, old: Tensor, mask: Tensor) -> tuple[float, float]:
    """The squared norms of a weight's change outside the mask, and of all of it."""
    change = (weight - old.masked_fill(~mask, 0)).double()
    return float(change.masked_fill(mask, 0).square().sum()), float(change.square().sum())


def _say_dropped(shares: Mapping[str, tuple[float, float]]) -> None:
    """Warn of what merging dropped, unless it is rounding."""
    outside, every = (sum(x[i] for x in shares.values()) for i in (0, 1))
    if outside <= 1e-12 * every:
        return
    worst = max(shares, key=lambda name: shares[name][0] / (shares[name][1] or 1))
    warnings.warn(
        f"merge_sparse dropped {(outside / every) ** 0.5:.0%} of what the adapters change (by "
        f"norm; most in {worst}), because it lies outside the supports and the adapters were not "
        "trained, or not lastly, inside sparse_lora: the merged model computes something else. An "
        "adapter that was trained inside it and loaded from a file loses nothing by this",
        stacklevel=3,
    )
