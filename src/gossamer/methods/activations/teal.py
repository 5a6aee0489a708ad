"""TEAL: inputs whose magnitude is below a threshold are skipped.

Every linear layer has one threshold, the quantile of its inputs' magnitudes in calibration data. A
token reads the weights of the inputs above it and no others.

**Paper.** Training-Free Activation Sparsity in Large Language Models, 2024.
https://arxiv.org/abs/2408.14690

**Claim.** 40 to 50% of weights unread over whole Llama and Mistral models with little loss of
quality, and decoding 1.53 and 1.8 times as fast. The claim was not tried here.

**Defaults.** Densities within a block by the greedy allocation: each step makes that layer sparser
which hurts the block's output least. The published step is 0.025 of the largest layer; 0.1 here,
which takes a quarter of the time.

**Notes.** The threshold is the quantile of |x|. The released code takes one of the signed values,
which assumes that they are symmetric about zero, and differs strongly where they are not. The error
of a step is that of the code: norms over the last quarter of positions, averaged over channels. A
cost is a layer's share of weights; the code's table for Llama-2 has other numbers for keys and
values. Prompts stay dense unless asked; the code masks the last half of theirs. In a model with
SiLU hardly an input is zero, so what is skipped is small rather than nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.activations import InputState, InputStats
from gossamer.core.card import Card
from gossamer.methods.activations.options import check_options


@dataclass(frozen=True)
class TEAL:
    """Inputs above a threshold of magnitude, one threshold for each layer.

    Parameters
    ----------
    density : float
        The fraction of weights that a token reads, over all layers.
    allocation : {"greedy", "uniform"}
        How layers of a block share it.
    step : float
        Sparsity that one greedy step adds to the largest layer of a block.
    per_token : bool
        Keep the same number of inputs for every token instead, which needs no data where the
        allocation is uniform.

    References
    ----------
    Training-Free Activation Sparsity in Large Language Models (2024).
    """

    density: float = 0.5
    allocation: str = "greedy"
    step: float = 0.1
    per_token: bool = False

    card: ClassVar[Card] = Card(
        name="teal",
        topic="activations",
        role="input_scorer",
        needs=(),
        patterns=("unstructured",),
        year=2024,
        link="https://arxiv.org/abs/2408.14690",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_options("TEAL", self.density, self.allocation, self.step)

    def prepare(self, weight: Tensor, stats: InputStats, density: float) -> InputState:
        """Nothing but the density."""
        return InputState(density)

    def score(self, x: Tensor, state: InputState) -> Tensor:
        """|x|, float32."""
        return state.score(x)
