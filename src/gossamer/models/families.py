"""The names that model families use. Structure decides first; these settle what it cannot."""

from __future__ import annotations

import re

from torch import Tensor, nn

HEADS = frozenset(
    {
        "lm_head",
        "embed_out",
        "classifier",
        "score",
        "pooler",
        "head",
        "heads",
        "qa_outputs",
        "cls",
        "predictions",
        "class_embed",
        "bbox_embed",
        "output_projection",
    }
)
"""Components of a dotted name that mark an output head: left dense unless named in."""

_HEAD_ENDS = ("_head", "_heads", "_classifier", "_predictor")
_ROUTERS = re.compile(r"(^|_)(router|gate|gating|wg)$")
_INPUTS = re.compile(r"(patch|pos|position|positional)(?:_[a-z]+)*_embed")


def is_head(name: str) -> bool:
    """Whether a dotted module name lies in an output head."""
    return any(part in HEADS or part.endswith(_HEAD_ENDS) for part in name.split("."))


def is_input_embedding(name: str, module: nn.Module) -> bool:
    """Whether a layer, by its dotted name, embeds patches of the input, or positions.

    A later stage's `patch_embed` reads many channels and is a layer like others.
    """
    match = next(filter(None, map(_INPUTS.search, name.split("."))), None)
    return match is not None and (match[1] != "patch" or getattr(module, "in_channels", 0) <= 4)


def is_router(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a layer, by its dotted name, chooses the experts of a mixture.

    A `router` does; a `gate` where it has one output, or experts lie beside it: other layers have
    gates too.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if not _ROUTERS.search(part):
            continue
        if part.endswith("router") or _outputs(module) == 1:
            return True
        parent = model.get_submodule(".".join(parts[:index]))
        beside = [*dict(parent.named_children()), *parent._parameters, type(parent).__name__]
        if any(re.search("expert|moe", each, re.IGNORECASE) for each in beside):
            return True
    return False


def _outputs(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or nn.parameter.is_lazy(weight) or weight.dim() != 2:
        return None
    return weight.shape[0]
