"""Sirius: a sparse model writes, and the dense model checks every few tokens.

The sparse model writes some tokens. The dense model then reads them all at once, which refreshes
their keys and values. Tokens that it finds unlikely are taken back, and it writes one itself.

**Paper.** Sirius: Contextual Sparsity with Correction for Efficient LLMs, 2024.
https://arxiv.org/abs/2409.03856

**Claim.** Most of the loss of sparse models on reasoning is recovered with a check every 16 tokens:
on GSM8K Llama-3-8B-Instruct falls from 0.754 to 0.384 at density 0.65 and comes back to 0.705 at
an effective density of 0.706. The claim was not tried here.

**Defaults.** 16 tokens between checks; a token is accepted from a probability of 0.1 at temperature
0.6, of 0.05 to 0.1 in the paper.

**Notes.** Any method that chooses inputs or neurons writes, not only the paper's two. The prompt is
read densely. With `accept` 1 a token has to be the dense model's own first choice, so the text is
that of dense greedy decoding, exactly. The dense tree of several beams is not built. A token that
was taken back counts once. The effective density adds the dense checks to what the sparse steps
read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.activations.teal import TEAL


@dataclass(frozen=True)
class Sirius:
    """A sparse writer with a dense reader behind it.

    Parameters
    ----------
    start : method
        What makes the model sparse, such as `TEAL(0.5)` or `CoreInfer()`.
    period : int
        Tokens that the sparse model writes between checks.
    accept : float
        Probability from which a token is accepted; from 1 on only the dense model's first choice.
    temperature : float
        Of these probabilities.

    References
    ----------
    Sirius: Contextual Sparsity with Correction for Efficient LLMs (2024).
    """

    start: Any = field(default_factory=TEAL)
    period: int = 16
    accept: float = 0.1
    temperature: float = 0.6

    card: ClassVar[Card] = Card(
        name="sirius",
        topic="activations",
        role="corrector",
        needs=(),
        patterns=("unstructured",),
        year=2024,
        link="https://arxiv.org/abs/2409.03856",
        status="experimental",
    )

    def __post_init__(self) -> None:
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise UsageError(f"Sirius: period is a whole number from 1, not {self.period!r}")
        if not 0 <= self.accept <= 1:
            raise UsageError(f"Sirius: accept is a probability, not {self.accept!r}")
        if not self.temperature > 0:
            raise UsageError(f"Sirius: temperature is above 0, not {self.temperature!r}")
