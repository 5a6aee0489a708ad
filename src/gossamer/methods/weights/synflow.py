"""SynFlow: iterative pruning at initialisation by synaptic flow, without data.

Before training, removes in many small rounds the weights through which least of an all-ones input
would flow if every weight were positive.

**Paper.** Pruning neural networks without any data by iteratively conserving synaptic flow, 2020.
https://arxiv.org/abs/2006.05467

**Claim.** It never removes a whole layer, and competes with or outperforms earlier pruning at
initialisation up to 99.99% sparsity, without looking at data.

**Defaults.** 100 rounds, of which round k ends at density^(k / 100); one global ranking.

**Notes.** The score is |w dR/dw|, where R is the sum of the outputs. All other parameters and
buffers take part by their absolute values, and the model is in evaluation mode, as in the released
code. Only the shape of an input is taken from `loss`. R is computed in float64, because it leaves
the range of float32 in deep networks. The released code prunes ties too, and so may keep fewer
weights than asked; here counts are exact. Inputs that are no real numbers, such as token ids, are
refused. A layer without a weight left is an error, and so is a network through which nothing flows. Biases
carry flow of their own, so at extreme densities the layers before them may be left without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.step import Step
from gossamer.methods.weights.topology import (
    StaticSupport,
    check_whole,
    derivatives,
    every_weight,
)
from gossamer.ops.select import select_global


@dataclass(frozen=True)
class SynFlow(StaticSupport):
    """Keep the weights with the largest synaptic flow, found in rounds, then train under them.

    Parameters
    ----------
    density : float
        The fraction kept, in (0, 1].
    rounds : int
        In how many steps, on an exponential schedule, the density is reached.
    """

    density: float
    rounds: int = 100

    card: ClassVar[Card] = Card(
        name="synflow",
        topic="weights",
        role="topology",
        needs=("loss",),
        patterns=("unstructured",),
        year=2020,
        link="https://arxiv.org/abs/2006.05467",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_whole(self.rounds, "SynFlow: the number of rounds")

    def start(self, step: Step) -> dict[str, Tensor]:
        """What is left after the last round. Raises UsageError where nothing flows any more."""
        masks = every_weight(step.layers)
        total = sum(x.size for x in step.layers)
        for index in range(1, self.rounds + 1):
            density = self.density ** (index / self.rounds)
            if index < self.rounds:  # whole weights are removed, as in the released code
                density = 1 - int((1 - density) * total) / total
            scores = self._scores(step, masks)
            supports = select_global(scores, Unstructured("global"), density)
            masks = {name: support.mask for name, support in supports.items()}
        return masks

    def _scores(self, step: Step, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """|w dR/dw| under the masks; -1 for what they leave out, so that it does not return."""
        weights = {
            x.name: _positive(x.weight.detach()).mul(masks[x.name]).requires_grad_()
            for x in step.layers
        }
        with torch.enable_grad():
            flow = derivatives(step.outputs(weights, _positive).sum(), weights)
        scores = {name: (weight.detach() * flow[name]).abs() for name, weight in weights.items()}
        if not any(bool(score.any()) for score in scores.values()):
            raise UsageError(
                f"SynFlow: at density {self.density:g} no path leads from the input to the output; "
                "keep more weights or exclude layers"
            )
        return {name: score.masked_fill(~masks[name], -1) for name, score in scores.items()}


def _positive(tensor: Tensor) -> Tensor:
    return tensor.abs().double()
