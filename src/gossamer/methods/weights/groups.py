"""What the structured regularisers share: coupled channels as groups of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.coupling import Coupled
from gossamer.core.density import check_density
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Unstructured
from gossamer.ops.select import select_global


def members(coupled: Sequence[Coupled], part: str, layers: Sequence[LayerInfo]) -> list[list[str]]:
    """The names in the run of each set's `layers` or `norms`.

    Raises UsageError where there is no set, or a set's member is not in the run, because then its
    channels could not be removed.
    """
    known = {x.name for x in layers}
    found = [list(getattr(x, part)) for x in coupled]
    for names in found:
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{name}: writes channels that are to be removed but is not in training; "
                    "include it, or leave its set out of `coupled`"
                )
    if not any(found):
        raise UsageError(f"no set of coupled channels has {part} to regularise")
    return [names for names in found if names]


def select_channels(
    sets: Sequence[Sequence[str]], scores: Sequence[Tensor], density: float, pooled: bool
) -> list[Tensor]:
    """The channels with the highest score: in each set, or `pooled` over all; one of each stays."""
    named = {names[0]: score for names, score in zip(sets, scores, strict=True)}
    ranked = [named] if pooled else [{name: score} for name, score in named.items()]
    supports = [select_global(x, Unstructured(), density, floor=1) for x in ranked]
    return [support.mask for part in supports for support in part.values()]


def check_structured(density: float, coupled: object) -> None:
    """Raise UsageError unless the density and the sets of channels make sense."""
    check_density(density)
    if not isinstance(coupled, tuple) or not all(isinstance(x, Coupled) for x in coupled):
        raise UsageError("coupled is what gs.coupled_channels(model, example) returns")


def row_masks(
    layers: Sequence[LayerInfo], sets: Sequence[Sequence[str]], kept: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Masks (out, in) that keep whole rows by set, and everything elsewhere."""
    rows: Mapping[str, Tensor] = {
        name: keep for names, keep in zip(sets, kept, strict=True) for name in names
    }
    masks = {}
    for x in layers:
        mask = torch.ones_like(x.weight, dtype=torch.bool)
        if x.name in rows:
            mask &= rows[x.name].unsqueeze(1)
        masks[x.name] = mask
    return masks
