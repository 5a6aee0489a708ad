"""Sparse-GIN: an adapter that passes messages along the strong edges of a model's own attention.

The attention of all heads is summed up and squashed to edges between tokens. Weak edges are cut.
Each token adds up what its edges bring, as a graph isomorphism network does, and a small network
turns that into a correction of the hidden state. Only the adapter is trained.

**Paper.** Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers, 2025.
https://arxiv.org/abs/2501.02393

**Claim.** The abstract gives no figure. It says that adapting a pretrained model so has a smaller
gap of generalisation and better training dynamics than LoRA. The claim was not tried here. Tests
compare the adapter with its formula, and an adapted model with its base.

**Defaults.** Edges of sigmoid(10 (sum - 0.1)), cut at 0.6 and below, so that sums of attention
above 0.14 survive; a scale of 0, with which the model is unchanged. The hidden width is the user's.

**Notes.** `gs.attention_adapters(model, adapters)` puts one behind each attention, before the
feed-forward network. Messages go from keys to queries. As we read the released code, it takes rows
as senders and then keeps senders that stand no later than receivers, which with a lower triangle
leaves each token its own message only; ours has the direction that the paper describes. A token
counts itself by a learned epsilon, which begins at 0, where graph isomorphism networks usually have
1 + epsilon. The whole map is needed for the sum, so nothing is saved: cut edges make the messages
sparse and not the attention. `GINAttention` in the same module is the paper's other layer, in which
the network acts on attention itself.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count


class SparseGIN(nn.Module):
    """A correction of hidden states by messages along strong attention.

    Parameters
    ----------
    channels : int
        Of the hidden states.
    hidden : int
        Of the small network.
    sharpness : float
        Of the edges' sigmoid.
    threshold : float
        The sum of attention at which an edge weighs a half.
    cut : float
        Edges up to this weight are left out; 0 keeps all.

    References
    ----------
    Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers (2025).
    """

    card: ClassVar[Card] = Card(
        name="sparsegin",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("unstructured",),
        year=2025,
        link="https://arxiv.org/abs/2501.02393",
        status="experimental",
    )

    def __init__(
        self, channels: int, hidden: int, sharpness: float = 10.0, threshold: float = 0.1,
        cut: float = 0.6,
    ) -> None:  # fmt: skip
        check_count("SparseGIN", "channels", channels)
        check_count("SparseGIN", "hidden", hidden)
        for name, value in (("sharpness", sharpness), ("threshold", threshold), ("cut", cut)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise UsageError(f"SparseGIN: {name} is a number from 0, not {value!r}")
        super().__init__()
        self.channels, self.sharpness = channels, float(sharpness)
        self.threshold, self.cut = float(threshold), float(cut)
        self.epsilon = nn.Parameter(torch.zeros(()))
        self.network = nn.Sequential(
            nn.Linear(channels, hidden), nn.PReLU(), nn.Linear(hidden, channels)
        )
        self.norm = nn.RMSNorm(channels)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        """Hidden states (batch, length, channels), corrected.

        attention: (batch, heads, length, length), each row a query's weights.
        """
        if x.dim() != 3 or x.shape[2] != self.channels:
            raise UsageError(
                f"SparseGIN takes (batch, length, {self.channels}), not {tuple(x.shape)}"
            )
        wanted = (len(x), x.shape[1], x.shape[1])
        if attention.dim() != 4 or (len(attention), *attention.shape[2:]) != wanted:
            raise UsageError(
                f"SparseGIN takes attention (batch, heads, length, length) of {x.shape[1]} tokens, "
                f"not {tuple(attention.shape)}"
            )
        found = self.epsilon * x + self.edges(attention).to(x.dtype) @ x
        corrected: Tensor = self.norm(self.network(found) + found)
        return x + self.scale * corrected

    def edges(self, attention: Tensor) -> Tensor:
        """The weight of the message from each key to each query, (batch, length, length)."""
        total = attention.sum(1).clamp(max=1)
        weights = torch.sigmoid(self.sharpness * (total - self.threshold)).tril()
        return weights.masked_fill(weights <= self.cut, 0)


class GINAttention(nn.Module):
    """Causal self-attention whose heads aggregate like a graph isomorphism network.

    Each head adds up its own slice of the input instead of projected values, and one small network
    serves all heads.

    Parameters
    ----------
    channels : int
        Of input and output.
    heads : int
        They divide `channels`.
    hidden : int
        Of the small network.
    dropout : float
        In it.
    """

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        if channels % heads:
            raise UsageError(f"GINAttention: {channels} channels do not divide into {heads} heads")
        super().__init__()
        self.heads = heads
        width = channels // heads
        self.query, self.key = (nn.Linear(channels, channels, bias=False) for _ in range(2))
        self.epsilon = nn.Parameter(torch.zeros(()))
        self.network = nn.Sequential(
            nn.Linear(width, hidden), nn.Dropout(dropout), nn.RMSNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, width),
        )  # fmt: skip
        self.project = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, channels) to the same."""
        query, key, own = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(x), x)
        )
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        found = self.network(self.epsilon * own + weights @ own)
        projected: Tensor = self.project(found.transpose(1, 2).flatten(2))
        return projected
