"""Paraformer: a query attends the sentences of a document by sparsemax, most of them not at all.

A fixed encoder gives a vector for the query and for each sentence. Products with the query are
projected onto the simplex, so few sentences have weight, and their mean decides the relevance.

**Paper.** Attentive Deep Neural Networks for Legal Document Retrieval, 2022.
https://arxiv.org/abs/2212.13899

**Claim.** The highest recall and F2 among the compared systems for retrieval on COLIEE; the abstract
gives no figure.

**Defaults.** A width of 768, two classes, no bias in the projections, and a share of 0.1 for the
network in `combined`, as in the paper's code.

**Notes.** The class is the head; sentence vectors come from an encoder of yours, which the release
keeps frozen. The Attentive CNN of the same paper puts a convolution over words before the same
sparsemax over sentences; its exact layers are not published, so it is not built. Padded sentences
are taken out before the projection. `weights="softmax"` is the dense form. Scores of network and
BM25 differ in scale, which `combined` does not mend: bring them to one scale first.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count, check_share
from gossamer.ops.sparsemax import sparsemax


class Paraformer(nn.Module):
    """Classification of a query and a document's sentences, by sparse attention over sentences.

    Parameters
    ----------
    width : int
        Of the vectors of query and sentences.
    classes : int
        Of the output.
    weights : str
        `sparsemax`, or `softmax` for dense attention.

    References
    ----------
    Attentive Deep Neural Networks for Legal Document Retrieval (2022).
    """

    card: ClassVar[Card] = Card(
        name="paraformer",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("unstructured",),
        year=2022,
        link="https://arxiv.org/abs/2212.13899",
        status="experimental",
    )

    def __init__(self, width: int = 768, classes: int = 2, weights: str = "sparsemax") -> None:
        check_count("Paraformer", "width", width)
        check_count("Paraformer", "classes", classes)
        if weights not in ("sparsemax", "softmax"):
            raise UsageError(f"Paraformer: weights are sparsemax or softmax, not {weights!r}")
        super().__init__()
        self.width, self.sparse = width, weights == "sparsemax"
        self.ask = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(2 * width, width, bias=False)
        self.classify = nn.Linear(width, classes)

    def forward(self, query: Tensor, sentences: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (batch, classes).

        query: (batch, width). sentences: (batch, sentences, width). real: bool (batch, sentences),
        False for padding; a document without sentences has a mean of 0.
        """
        asked = self._asked(query, sentences, real)
        weights = self._weights(asked, sentences, real).unsqueeze(1)
        if real is not None:  # what padding holds does not matter
            sentences = sentences.masked_fill(~real.unsqueeze(-1), 0)
        mean = (weights @ sentences).squeeze(1)
        seen = torch.tanh(self.mix(torch.cat([mean, asked], dim=-1)))
        logits: Tensor = self.classify(seen)
        return logits

    def attention(self, query: Tensor, sentences: Tensor, real: Tensor | None = None) -> Tensor:
        """The weight of each sentence, (batch, sentences); rows sum to 1."""
        return self._weights(self._asked(query, sentences, real), sentences, real)

    def _asked(self, query: Tensor, sentences: Tensor, real: Tensor | None) -> Tensor:
        fits = sentences.dim() == 3 and query.shape == sentences[:, 0:1].squeeze(1).shape
        if not fits or query.shape[1] != self.width:
            raise UsageError(
                f"Paraformer takes a query (batch, {self.width}) and sentences (batch, n, "
                f"{self.width}), not {tuple(query.shape)} and {tuple(sentences.shape)}"
            )
        if real is not None and (real.dtype != torch.bool or real.shape != sentences.shape[:2]):
            raise UsageError(
                f"Paraformer: real is bool {tuple(sentences.shape[:2])}, not {real.dtype} "
                f"{tuple(real.shape)}"
            )
        asked: Tensor = self.ask(query)
        return asked

    def _weights(self, asked: Tensor, sentences: Tensor, real: Tensor | None) -> Tensor:
        scores = (sentences @ asked.unsqueeze(-1)).squeeze(-1)
        if self.sparse:
            return sparsemax(scores, mask=real)
        if real is None:
            return scores.softmax(-1)
        weights = scores.masked_fill(~real, -torch.inf).softmax(-1)
        return torch.where(real.any(-1, keepdim=True), weights, 0.0)


def combined(scores: Tensor, lexical: Tensor, share: float = 0.1) -> Tensor:
    """share times the network's scores, and the rest of the lexical ones, such as BM25's."""
    check_share("Paraformer", "share", share)
    if scores.shape != lexical.shape:
        raise UsageError(
            f"scores of {tuple(scores.shape)} and lexical ones of {tuple(lexical.shape)} differ"
        )
    return share * scores + (1 - share) * lexical
