"""Training under a support that already exists.

Trains a sparse model on without changing which weights are zero.

**Defaults.** The weights that are not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.step import Step
from gossamer.methods.weights.topology import StaticSupport


@dataclass(frozen=True)
class FixedMasks(StaticSupport):
    """Hold the support that the model has, for fine-tuning a pruned model.

    Parameters
    ----------
    masks : mapping of str to Tensor, optional
        bool (out, in) by the name of the layer, where a kept weight may be zero. By default the
        support is the non-zero weights.
    """

    masks: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    card: ClassVar[Card] = Card(
        name="keep",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("unstructured",),
        year=2026,
        link="",
        status="stable",
    )

    def start(self, step: Step) -> dict[str, Tensor]:
        """The given support. Raises UsageError where it is not one of these layers."""
        if self.masks is None:
            return {x.name: x.weight != 0 for x in step.layers}
        found = {name: mask.shape for name, mask in self.masks.items()}
        wanted = {x.name: x.weight.shape for x in step.layers}
        if found != wanted:
            odd = sorted(found.keys() ^ wanted.keys()) or [
                n for n in found if found[n] != wanted[n]
            ]
            raise UsageError(
                f"{odd[0]}: the given support and the layers in training differ; pass the same "
                "include and exclude to both"
            )
        return {x.name: self.masks[x.name].to(x.weight.device) for x in step.layers}
