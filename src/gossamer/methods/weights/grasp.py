"""GraSP: preserving the gradient flow at initialisation.

Before training, removes the weights without which the norm of the gradient grows most or falls
least, by one Hessian-gradient product on one batch.

**Paper.** Picking Winning Tickets Before Training by Preserving Gradient Flow, 2020.
https://arxiv.org/abs/2002.07376

**Claim.** VGG-16 on ImageNet loses 1.6% of its top-1 accuracy at 80% sparsity. At extreme sparsity
the masks are significantly better than those of SNIP.

**Defaults.** Logits divided by 200, one batch, one global ranking, no floor per layer.

**Notes.** The score is w (H g), of which the largest are kept. The released code sums gradients and
products over parts of a batch that has ten examples of each class; here `loss` is one batch, of the
user's choice. The released code also draws the weights anew before it scores and keeps one weight
more than its fraction; ours keeps the initialisation and exact counts. Division by the temperature
acts on the model's output, so the loss must be computed from it. A layer that the ranking would
empty is an error. Several ranks are refused, as second derivatives are not averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.step import Step
from gossamer.methods.weights.topology import StaticSupport, derivatives
from gossamer.ops.select import select_global


@dataclass(frozen=True)
class GraSP(StaticSupport):
    """Keep the largest w (H g) of one batch over all layers together, then train under it.

    Parameters
    ----------
    density : float
        The fraction kept, in (0, 1].
    temperature : float
        What the model's outputs, logits, are divided by before the loss.
    """

    density: float
    temperature: float = 200.0

    card: ClassVar[Card] = Card(
        name="grasp",
        topic="weights",
        role="topology",
        needs=("loss",),
        patterns=("unstructured",),
        year=2020,
        link="https://arxiv.org/abs/2002.07376",
        status="experimental",
    )

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"GraSP needs a temperature above 0, not {self.temperature}")

    def start(self, step: Step) -> dict[str, Tensor]:
        """The weights that the gradient flow needs most. Raises UsageError where none does."""
        weights = {x.name: x.weight.detach().clone().requires_grad_() for x in step.layers}
        with torch.enable_grad():
            found = derivatives(step.loss(weights, self.temperature), weights, graph=True)
            norm = torch.stack([(g.detach() * g).sum() for g in found.values()]).sum()
            if not norm.requires_grad:
                raise UsageError("GraSP: the loss has no curvature, so every score would be zero")
            curved = torch.autograd.grad(norm, list(weights.values()), materialize_grads=True)
        scores = {
            name: weight.detach() * product
            for (name, weight), product in zip(weights.items(), curved, strict=True)
        }
        supports = select_global(scores, Unstructured("global"), self.density)
        return {name: support.mask for name, support in supports.items()}
