"""CoreInfer: the neurons that a prompt uses most serve everything after it.

While a prompt is read, each of its tokens names the neurons of the feed-forward network that are
largest. Those that most tokens name are kept, and every later token is computed with them alone.

**Paper.** CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive
Sparse Activation, 2024. https://arxiv.org/abs/2410.18311

**Claim.** On a TITAN Xp 10.33 times as fast as Hugging Face transformers and 2.72 times as
PowerInfer, with little loss. Much of that comes from not moving weights to the GPU. The claim was
not tried here.

**Defaults.** 40% of the neurons kept, which the paper calls a sparsity of 0.4; a token names a
fifth of those that it activates; blocks 6 to 26 of 32, here the same part of any depth.

**Notes.** This is the stability-guided choice, for prompts of some length; the similarity-guided
one, with clusters of a corpus, is not built. A neuron is active where its value is positive, as in
models with ReLU. With SiLU and a gate every sign means something, so magnitudes count: `by="size"`,
the default. Where fewer neurons are named than the budget holds, the largest of the others fill it;
the released code keeps fewer. Neurons are chosen for each text of a batch. They grow stale where
the text leaves the prompt's subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.density import check_density, kept_count
from gossamer.core.errors import UsageError


@dataclass(frozen=True)
class CoreInfer:
    """The neurons that most tokens of the prompt name.

    Parameters
    ----------
    density : float
        The fraction of neurons kept.
    token_share : float
        The fraction of its active neurons that a token names, the largest.
    by : {"size", "positive"}
        Whether neurons rank by magnitude, or by value with those above zero active.
    first, last : float
        The part of the model's depth whose blocks are served so, from 0 to 1.

    References
    ----------
    CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse
    Activation (2024).
    """

    density: float = 0.4
    token_share: float = 0.2
    by: str = "size"
    first: float = 0.1875
    last: float = 0.84375

    card: ClassVar[Card] = Card(
        name="coreinfer",
        topic="activations",
        role="neuron_selector",
        needs=(),
        patterns=("unstructured",),
        year=2024,
        link="https://arxiv.org/abs/2410.18311",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_density(self.density)
        check_density(self.token_share)
        if self.by not in ("size", "positive"):
            raise UsageError(f"CoreInfer: by is 'size' or 'positive', not {self.by!r}")
        if not 0 <= self.first < self.last <= 1:
            raise UsageError(
                f"CoreInfer: first and last are depths from 0 to 1, not {self.first} and {self.last}"
            )

    def serves(self, block: int, blocks: int) -> bool:
        """Whether a block, by its place, is served by chosen neurons."""
        return self.first <= (block + 0.5) / blocks <= self.last

    def neurons(self, activations: Tensor) -> Tensor:
        """int64 (count,), ascending: of activations (tokens, neurons), those that most tokens name.

        Ties go to the neuron with the larger sum of magnitudes.
        """
        wide = activations.float()
        sizes = wide.abs()
        ranked = sizes if self.by == "size" else wide.clamp(min=0)
        active = float((ranked > 0).sum()) / len(wide)
        named = max(1, min(round(self.token_share * active), wide.shape[1]))
        top = torch.topk(ranked, named, dim=1)
        votes = torch.zeros(wide.shape[1], device=wide.device)
        votes.scatter_add_(0, top.indices.flatten(), (top.values > 0).float().flatten())
        mean = sizes.mean(dim=0)
        votes += mean / (mean.max() * 2 + torch.finfo(torch.float32).tiny)
        count = kept_count(wide.shape[1], self.density)
        found: Tensor = torch.topk(votes, max(1, count)).indices.sort().values
        return found
