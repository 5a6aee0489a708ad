"""MaskSparsity: an L1 pull on the batch norm scales of only those channels that are to go.

Pulls the batch norm scales of chosen channels to zero and leaves all others alone, so that cutting
the chosen ones out costs nothing.

**Paper.** Pruning-aware Sparse Regularization for Network Pruning, 2021.
https://arxiv.org/abs/2201.06776

**Claim.** Penalising only the channels that will be pruned leaves the others their capacity:
ResNet-110 on CIFAR-10 loses 63% of its FLOPs and no accuracy.

**Defaults.** Penalty 5e-4, one ranking of scales over all sets; the pull on every scale for a
quarter of the run, on the marked ones until three quarters, then the cut.

**Notes.** Start from a trained network. The marks are given as `masks`, from any source, or taken
from the scales after a stage that pulls all of them. To restart from the trained network, as the
paper does, run `targeted=False` on a copy and pass its `run.masks` on. In one run training goes on
from the first stage instead. The pull is added to the gradient before the optimizer's step. Coupled
channels are marked together, by the mean of their scales. Weight decay still shrinks the scales
that stay unless the optimizer leaves them out. The shift of a dead channel lives on as a constant;
gs.remove_channels folds it. The penalty must fit the run: too small a one leaves marked scales that
the cut then takes. The release also has penalties other than L1 and a cut by a share of energy,
which are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.coupling import Coupled
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Channel, Pattern
from gossamer.core.step import Step
from gossamer.methods.weights.groups import (
    check_structured,
    choose,
    members,
    row_masks,
)
from gossamer.methods.weights.topology import StaticSupport, check_fraction, every_weight


@dataclass(frozen=True)
class MaskSparsity(StaticSupport):
    """Pull the batch norm scales of marked channels to zero, and cut those channels.

    Parameters
    ----------
    density : float, optional
        The fraction of channels kept, in (0, 1]. None where `masks` or `threshold` decide.
    coupled : tuple of Coupled
        The channels that go together, from `gs.coupled_channels(model, batch)`.
    penalty : float
        The pull on a marked scale, times its sign.
    begin : float
        Until this fraction of the run every scale is pulled, and the smallest are marked then: all
        but `density`, or those below `threshold`. It has no meaning with `masks`.
    until : float
        When the marked channels are zeroed, as a fraction of the run.
    pooled : bool
        One ranking over all sets rather than one in each.
    targeted : bool
        False pulls every scale up to the cut, which goes by the scales then. This is the plain L1
        that the paper compares with, and its own first stage.
    threshold : float, optional
        Zero the channels whose scales have all come below it, as published. The density is then
        what comes out.
    masks : mapping of str to Tensor, optional
        The marks, bool (channels,) or (channels, 1) by batch norm, True where a channel stays.
        What `SparseRun.masks` of another run holds will do.
    """

    density: float | None
    coupled: tuple[Coupled, ...]
    penalty: float = 5e-4
    begin: float = 0.25
    until: float = 0.75
    pooled: bool = True
    targeted: bool = True
    threshold: float | None = None
    masks: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    trains_scales: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="masksparsity",
        topic="weights",
        role="topology",
        needs=(),
        patterns=("channel",),
        year=2021,
        link="https://arxiv.org/abs/2201.06776",
        status="stable",
    )

    def __post_init__(self) -> None:
        given = self.masks is not None
        check_structured(1.0 if self.density is None else self.density, self.coupled)
        check_fraction(self.begin, "begin")
        check_fraction(self.until, "until")
        if not self.penalty >= 0 or (self.threshold is not None and not self.threshold > 0):
            raise UsageError("MaskSparsity needs penalty >= 0 and a threshold above 0, or None")
        if self.density is None and self.threshold is None and not given:
            raise UsageError("MaskSparsity needs a density, a threshold or masks")
        if given and not self.targeted:
            raise UsageError("MaskSparsity: masks say whom to pull, and targeted=False pulls all")
        if self.targeted and not given and self.begin > self.until:
            raise UsageError("MaskSparsity needs begin <= until")

    @property
    def pattern(self) -> Pattern:
        """Whole rows, of one scale each."""
        return Channel(0)

    def start(self, step: Step) -> dict[str, Tensor]:
        """Every channel; the sets and the given masks are checked now."""
        sets = members(self.coupled, "norms", step.layers)
        if self.masks is not None:
            self.given(step.layers, sets)
        return every_weight(step.layers)

    def first_state(self, step: Step) -> dict[str, dict[str, Tensor]]:
        """The marks, bool (channels, 1): which channels are to stay. Before they are taken, all."""
        if not self.targeted:
            return {}
        if self.masks is not None:
            stays = self.given(step.layers, members(self.coupled, "norms", step.layers))
        elif self.first(step.total) == 0:
            stays = self.smallest(step.layers)
        else:
            stays = every_weight(step.layers)
        return {name: {"stays": mark} for name, mark in stays.items()}

    def edit_gradient(self, step: Step, layer: LayerInfo, gradient: Tensor) -> Tensor:
        """gradient + penalty * sign(scale): of every channel at first, then of those marked."""
        pull = self.penalty * layer.weight.sign()
        if not self.targeted or (self.masks is None and step.number <= self.first(step.total)):
            return gradient + pull
        return gradient + pull.masked_fill(self.marks(step, layer), 0)

    def next_state(self, step: Step, layer: LayerInfo, gradient: Tensor) -> dict[str, Tensor]:
        """The marks, which are taken before the first step of the second stage."""
        return {"stays": self.marks(step, layer)} if self.targeted else {}

    def due(self, step: int, total: int) -> bool:
        """At the last step of the stage."""
        return step == self.last(total)

    def update(self, step: Step) -> list[dict[str, Tensor]]:
        """The channels that stay: those marked, or those whose scales are large now."""
        if self.threshold is not None:
            return [self.above(step.layers, self.threshold)]
        # With begin == until, or no marks at all, nobody was marked before.
        if self.masks is None and (not self.targeted or step.number <= self.first(step.total)):
            return [self.smallest(step.layers)]
        return [{x.name: x.state["stays"].clone() for x in step.layers}]

    def marks(self, step: Step, layer: LayerInfo) -> Tensor:
        """The layer's marks in the step that comes."""
        if self.masks is None and 1 < step.number == self.first(step.total) + 1:
            return self.smallest(step.layers)[layer.name]
        return layer.state["stays"]

    def smallest(self, layers: Sequence[LayerInfo]) -> dict[str, Tensor]:
        """Masks without the channels that the scales of this moment mark."""
        if self.density is None:
            assert self.threshold is not None
            return self.above(layers, self.threshold)
        sets, scores = self.scores(layers)
        return row_masks(layers, sets, choose(scores, self.density, self.pooled))

    def above(self, layers: Sequence[LayerInfo], threshold: float) -> dict[str, Tensor]:
        """Masks without the channels whose scales are all below; one of each set stays."""
        sets, _ = self.scores(layers)
        scale = {x.name: x.weight.abs().squeeze(1) for x in layers}
        largest = [torch.stack([scale[name] for name in names]).amax(0) for names in sets]
        kept = [(top >= threshold) | (top == top.max()) for top in largest]
        return row_masks(layers, sets, kept)

    def given(
        self, layers: Sequence[LayerInfo], sets: Sequence[Sequence[str]]
    ) -> dict[str, Tensor]:
        """The masks that were passed, as (channels, 1). Raises UsageError where they do not fit."""
        assert self.masks is not None
        shapes = {x.name: x.weight.shape for x in layers}
        stays = every_weight(layers)
        coupled = [name for names in sets for name in names]
        for name in sorted({*self.masks, *coupled}):
            mask = self.masks.get(name)
            if mask is None or name not in shapes or mask.numel() != len(stays[name]):
                raise UsageError(
                    f"{name}: MaskSparsity needs one mask for each batch norm of `coupled`, bool "
                    "(channels,), and none for others"
                )
            if mask.dtype != torch.bool or not bool(mask.any()):
                raise UsageError(f"{name}: its mask is not bool, or keeps no channel")
            stays[name] = mask.reshape(-1, 1).to(stays[name].device).clone()
        for names in sets:
            for name in names:
                if not torch.equal(stays[name], stays[names[0]]):
                    raise UsageError(
                        f"{name}: its mask is not that of {names[0]}, whose channels are coupled "
                        "with it"
                    )
        return stays

    def first(self, total: int) -> int:
        """The last step of the stage that pulls every scale."""
        return math.floor(self.begin * total)

    def last(self, total: int) -> int:
        """The last step before the cut."""
        return max(1, math.floor(self.until * total))

    def scores(self, layers: Sequence[LayerInfo]) -> tuple[list[list[str]], list[Tensor]]:
        """The sets' norms, and the mean |scale| of each channel over them."""
        sets = members(self.coupled, "norms", layers)
        scale = {x.name: x.weight.abs().double().squeeze(1) for x in layers}
        return sets, [torch.stack([scale[n] for n in names]).mean(0) for names in sets]
