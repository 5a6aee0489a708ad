"""LoRA on a sparse model: the zeros of the base hold while it trains and after merging.

Plain LoRA adds a dense product B A to each weight, so merging it fills every zero. Dropping what
fell outside the support after training would restore the zeros but change what the model learned.
`sparse_lora` therefore masks the product in every forward pass of the training, and `merge_sparse`
then merges exactly that function: the merged model is as sparse as the base and computes what was
trained, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.engine.hooks import adjust_outputs

try:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
except ImportError:
    raise MissingExtra("peft", "peft") from None


@contextmanager
def sparse_lora(model: PeftModel) -> Iterator[dict[str, Tensor]]:
    """While open, each adapter acts only where its base weight is not zero; yields those masks.

    Masks have the base weights' shapes and are by the names of the adapted layers. A forward pass
    costs one further dense product for each adapted sparse layer. Open it again to evaluate the
    adapter after training, or merge.

    Raises UsageError for dropout, DoRA and other variants, whose product cannot be masked exactly,
    for adapters that are merged already, and when no adapted layer has zeros.
    """
    layers = _adapted(model)
    masks = {name: _mask(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            dropout = dict(layer.lora_dropout.items()).get(adapter)
            if getattr(dropout, "p", 0) or adapter in layer.lora_variant:
                raise UsageError(
                    f"{name}: its adapter uses dropout, DoRA or another variant of LoRA, which "
                    "cannot be masked; configure plain LoRA with lora_dropout=0"
                )
    with adjust_outputs([(layer, _inside(layer, masks[name])) for name, layer in layers.items()]):
        yield masks


def merge_sparse(model: PeftModel) -> nn.Module:
    """The base model with the adapters merged inside its supports; what was zero is exactly zero.

    An adapter trained in `sparse_lora` merges without loss. Of one trained without it, the part
    outside the supports is dropped. Raises UsageError, nothing changed, for merged adapters.
    """
    layers = _adapted(model)
    places = [(layer.get_base_layer(), _mask(layer)) for layer in layers.values()]
    merge: Any = model.merge_and_unload
    merged = merge()
    with torch.no_grad():
        for base, mask in places:
            base.weight.masked_fill_(~mask, 0)
    return merged


def _adapted(model: PeftModel) -> dict[str, Any]:
    """The LoRA layers over a base weight with zeros, by name."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.merged:
            raise UsageError(f"{name}: its adapter is merged already, so the zeros are lost; "
                             "call unmerge_adapter() first")  # fmt: skip
        weight = getattr(layer.get_base_layer(), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and not bool(weight.all()):
            if isinstance(layer.get_base_layer(), nn.Embedding):
                raise UsageError(f"{name}: adapters of sparse embeddings are not supported")
            found[name] = layer
    if not found:
        raise UsageError("no layer with an adapter has zeros; prune the model before adding LoRA")
    return found


def _mask(layer: Any) -> Tensor:
    return layer.get_base_layer().weight.detach() != 0


def _inside(layer: Any, mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Takes out of the layer's output what its adapters add outside the mask."""
    base = layer.get_base_layer()

    def adjust(x: Tensor, output: Tensor) -> Tensor:
        if layer.disable_adapters or layer.merged:
            return output
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            outside = layer.get_delta_weight(adapter).masked_fill(mask, 0)
            parts = {"weight": outside}
            if getattr(base, "bias", None) is not None:
                parts["bias"] = torch.zeros_like(base.bias, dtype=outside.dtype)
            extra = torch.func.functional_call(base, parts, (x.to(outside.dtype),))
            output = output - extra.to(output.dtype)
        return output

    return adjust
