"""MaskLLM: an N:M mask learned by sampling, over frozen weights.

Learns for each group of weights which pattern of N:M serves it, while the weights rest.

**Paper.** MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models, 2024.
https://arxiv.org/abs/2409.17481

**Claim.** Learned 2:4 masks of LLaMA-2-7B reach a perplexity of 6.72, where SparseGPT reaches 10.42
and the dense model 5.12.

**Defaults.** Those of the released code: 2:4; logits drawn with deviation 0.01; a prior of strength
3; temperature 4 to 0.05 and scale 100 to 500, both linear over the run; the weight regulariser from
1e-5 to 0. The rate of the logits is 5e-4, ten times the paper's for weights.

**Notes.** Noise is drawn once a step, so that accumulated batches and recomputed forwards see one
mask; the paper draws at every forward. In evaluation mode the mask is the likeliest pattern, which
is what remains. The prior is by magnitude; the paper's is a mask by SparseGPT, which `prior=` takes
as the supports of a pruned copy. All parameters of the model rest, also biases and norms. Logits
are not decayed. Patterns with more than 70 choices a group are refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.allocation import LayerInfo
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.core.pattern import NM
from gossamer.core.step import Step
from gossamer.core.support import Support
from gossamer.ops.select import select

TWO_OF_FOUR = NM(2, 4)
_CHOICES = 70
"""The most patterns of a group, those of 4:8: each costs a logit per group."""


@dataclass(frozen=True)
class MaskLLM:
    """Softmax over the patterns of each group, of scaled logits with Gumbel noise, ever colder.

    Parameters
    ----------
    pattern : NM
        What remains.
    rate : float
        The learning rate of the logits.
    temperature, scale : tuple of float
        The first and the last value of a linear schedule.
    regulariser : tuple of float
        The same, of what the squared norm of the masked weights is multiplied by and taken off the
        loss.
    strength : float
        Of the prior, in standard deviations of a layer's logits.
    prior : mapping of str to Support, optional
        Supports by layer name to begin near; by default the largest |w|.
    """

    pattern: NM = TWO_OF_FOUR
    rate: float = 5e-4
    temperature: tuple[float, float] = (4.0, 0.05)
    scale: tuple[float, float] = (100.0, 500.0)
    regulariser: tuple[float, float] = (1e-5, 0.0)
    strength: float = 3.0
    prior: Mapping[str, Support] | None = field(default=None, repr=False)

    freezes: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="maskllm",
        topic="weights",
        role="learned_mask",
        needs=(),
        patterns=("nm",),
        year=2024,
        link="https://arxiv.org/abs/2409.17481",
        status="experimental",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, NM):
            raise UsageError("MaskLLM needs an N:M pattern, such as NM(2, 4)")
        choices = math.comb(self.pattern.group, self.pattern.keep)
        if choices > _CHOICES:
            raise UsageError(
                f"MaskLLM: {self.pattern.keep}:{self.pattern.group} has {choices} patterns a "
                f"group, each with a logit; choose one with at most {_CHOICES}, such as 2:4 or 4:8"
            )
        if min(self.temperature) <= 0 or not self.rate > 0:
            raise UsageError("MaskLLM needs temperatures and a rate above 0")

    def mask(self, layer: LayerInfo, step: Step) -> nn.Module:
        """Logits near the prior. Raises UsageError for a prior that does not fit the layer."""
        if self.prior is None:
            density = self.pattern.density
            prior = select(layer.weight.abs(), self.pattern, density, layer.name).mask
        else:
            support = self.prior.get(layer.name)
            if support is None or support.mask.shape != layer.weight.shape:
                raise UsageError(
                    f"{layer.name}: prior= has no support of its shape "
                    f"{tuple(layer.weight.shape)}; prune a copy of this model for it"
                )
            prior = support.mask.to(layer.weight.device)
        return SampledMask(self, layer, prior, step.generator)


class SampledMask(nn.Module):
    """weight * sum over patterns of their probability; in evaluation mode the likeliest pattern.

    Logits are (patterns, groups): a softmax over a first dimension is many times faster on a CPU.
    """

    candidates: Tensor
    noise: Tensor
    now: Tensor

    def __init__(
        self, method: MaskLLM, layer: LayerInfo, prior: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.method, group = method, method.pattern.group
        chosen = list(itertools.combinations(range(group), method.pattern.keep))
        candidates = torch.zeros(len(chosen), group)
        for row, kept in zip(candidates, chosen, strict=True):
            row[list(kept)] = 1
        shape = (len(chosen), layer.weight.numel() // group)
        logits = torch.randn(shape, generator=generator) * 0.01
        self.register_buffer("candidates", candidates)
        self.register_buffer("noise", torch.zeros(shape))
        self.register_buffer("now", torch.zeros(3))
        start = logits + prior_shift(logits, candidates, prior.cpu(), method.strength)
        self.logits = nn.Parameter(start)

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight (out, in)."""
        if not self.training:
            return weight * self.finish(weight).mask.to(weight.dtype)
        return weight * self.soft().reshape(weight.shape).to(weight.dtype)

    def soft(self) -> Tensor:
        """The mask of this step, (groups, weights of a group)."""
        temperature, scale, _ = self.now.unbind()
        chances = torch.addcmul(self.noise, self.logits, scale).div_(temperature).softmax(dim=0)
        return (self.candidates.t() @ chances).t()

    def loss(self, weight: Tensor) -> Tensor:
        """Minus the regulariser times the squared norm of the masked weights."""
        masked = weight.float() * self.soft().reshape(weight.shape)
        return -self.now[2] * masked.square().sum()

    def advance(self, step: Step) -> None:
        """The schedules' values, and new noise."""
        method, done = self.method, step.number / step.total
        pairs = (method.temperature, method.scale, method.regulariser)
        self.now.copy_(torch.tensor([first + (last - first) * done for first, last in pairs]))
        drawn = torch.rand(self.noise.shape, generator=step.generator)
        for _ in range(2):  # Gumbel: minus the logarithm, twice
            drawn.clamp_min_(1e-20).log_().neg_()
        self.noise.copy_(drawn)

    def finish(self, weight: Tensor) -> Support:
        """The likeliest pattern of each group."""
        mask = self.candidates[self.logits.argmax(dim=0)].bool().reshape(weight.shape)
        return Support(mask, self.method.pattern, self.method.pattern.density)


def prior_shift(logits: Tensor, candidates: Tensor, prior: Tensor, strength: float) -> Tensor:
    """What a mask adds to the logits: by how much more a pattern overlaps it than the average
    pattern does, in deviations of the logits."""
    overlap = candidates @ prior.reshape(-1, candidates.shape[1]).float().t()
    keep, group = int(candidates[0].sum()), candidates.shape[1]
    return (overlap - keep * keep / group) * logits.std() * strength
