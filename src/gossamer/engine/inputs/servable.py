"""Which attention of transformers can be served; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import UsageError

IMPLEMENTATION = "_attn_implementation_internal"
"""Where a config of transformers keeps the name of its attention."""

_UNSERVED = {
    "softcap": "caps its logits (softcap)",
    "s_aux": "has sinks among its parameters (s_aux)",
    "position_bias": "adds a bias of positions to its logits",
    "sliding_window": "has a sliding window",
    "cu_seq_lens_q": "is given packed sequences (cu_seq_lens_q)",
    "cache": "is given a paged cache",
}
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings", "input_ids"})


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hand their queries to transformers' AttentionInterface, by name.

    Raises UsageError, naming it, for attention that cannot be served. Nothing is changed.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_causal") and hasattr(module, "config")
    }
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no attention of transformers' AttentionInterface; in a "
            "model of your own call gs.attend"
        )
    for module in model.modules():
        check_config(module)
    for name, layer in layers.items():
        check_layer(name, layer, model.training)
    return layers


def check_config(module: nn.Module) -> None:
    """Raise UsageError where a model of transformers, or a part of one, cannot be served."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "_attn_implementation"):
        return
    kind = type(module).__name__
    settable = getattr(module, "_can_set_attn_implementation", None)
    if settable is not None and not settable():
        raise UsageError(f"{kind} has attention of its own, not transformers' AttentionInterface")
    found = vars(config).get(IMPLEMENTATION)
    if found is not None and found.startswith("gossamer"):
        raise UsageError(
            "the model is in a block of gs.sparse_attention already; leave that one first"
        )
    if found not in ("sdpa", "eager"):
        raise UsageError(
            f"{kind} runs attention {found!r}; call model.set_attn_implementation('sdpa') first"
        )
    for reason, present in _reasons(config).items():
        if present:
            raise UsageError(f"{kind} {reason}, which gs.sparse_attention does not serve")


def _reasons(config: Any) -> dict[str, bool]:
    """What about a config cannot be served, and whether it is so."""

    def value(name: str) -> Any:
        return getattr(config, name, None)

    kinds = set(value("layer_types") or ()) - {"full_attention", "attention"}
    window = value("sliding_window") is not None and not value("layer_types")
    window = window and value("use_sliding_window") is not False
    return {
        f"has layers of {', '.join(sorted(map(str, kinds)))}": bool(kinds),
        f"has a sliding window of {value('sliding_window')}": window,
        "caps its logits (attn_logit_softcapping)": value("attn_logit_softcapping") is not None,
        "adds biases of positions (relative_attention_num_buckets)": (
            value("relative_attention_num_buckets") is not None
        ),
        "is an encoder and a decoder": bool(value("is_encoder_decoder")),
        "attends to another model's states (add_cross_attention)": bool(
            value("add_cross_attention")
        ),
        "gives out attention weights (output_attentions)": bool(value("output_attentions")),
    }


def check_layer(name: str, layer: nn.Module, training: bool) -> None:
    """Raise UsageError where one attention layer cannot be served."""
    if getattr(layer, "sinks", None) is not None:
        raise UsageError(f"{name} has sinks among its parameters, which are not served")
    if getattr(layer, "sliding_window", None) is not None:
        raise UsageError(f"{name} has a sliding window of {layer.sliding_window}")
    dropout = [getattr(layer, "attention_dropout", 0), getattr(layer, "dropout", 0)]
    rates = [getattr(rate, "p", rate) for rate in dropout]
    if training and any(isinstance(rate, int | float) and rate > 0 for rate in rates):
        raise UsageError(
            f"{name} drops attention weights while it trains; set its dropout to 0, or call "
            "model.eval()"
        )


def check_arguments(layer: int, dropout: float, others: Mapping[str, Any]) -> None:
    """Raise UsageError where a layer's call asks for what cannot be served."""
    if dropout > 0:
        raise UsageError(f"layer {layer} drops attention weights; set its dropout to 0")
    if others.get("output_attentions"):
        raise UsageError("attention weights are never whole here: leave output_attentions out")
    for name, value in others.items():
        if value is not None and name in _UNSERVED:
            raise UsageError(f"layer {layer} {_UNSERVED[name]}, which is not served")
        if isinstance(value, Tensor) and name not in _HARMLESS:
            raise UsageError(f"layer {layer} is given {name}, which gs.sparse_attention ignores")
