"""Routing Transformer: attention within clusters of tokens, which online k-means keeps up.

Some heads attend a window of near tokens. The others share queries and keys, normalised, and have
centroids. Each centroid takes the tokens that point most in its direction, so that clusters are
balanced, and these attend each other.

**Paper.** Efficient Content-Based Sparse Attention with Routing Transformers, 2020.
https://arxiv.org/abs/2003.05997

**Claim.** 15.8 perplexity on WikiText-103 against 18.3 of a transformer with relative positions, at
fewer layers, and state of the art on PG-19 at 8,192 tokens. The claim was not tried here.

**Defaults.** Decay of 0.999, a smoothing of 1e-5, commitment 0.25, as the release's signature.
Clusters and their size are the user's: about the root of the length both.

**Notes.** In the paper a centroid takes its best tokens out of the whole text, so that what an
early token attends depends on later ones, and decoding does something else than training did. Here
a centroid takes the best tokens of every prefix: a query that belongs to a cluster as of its own
place attends that cluster's members as of then. Outputs never change with what follows.
`whole=True` is the paper's reading. A token may be in several clusters, whose outputs are averaged
as in the release (the sum over the count + 0.01), or in none, and then has an output of 0. Early
tokens are in every cluster. Centroids are buffers: no gradient reaches them, and in training each
forward moves them by the nearest assignments. Add `layer.commitment` to the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.attention import AttentionCall
from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.running import Part, lists_of, running_top
from gossamer.methods.attention.streaming import StreamingLLM
from gossamer.methods.attention.tiles import check_count, check_share
from gossamer.nn.attention_gate import rotated
from gossamer.ops.attention import Layout, attention
from gossamer.ops.select import keep

_SMOOTHING = 1e-5
_AVERAGING = 0.01


class RoutingTransformer(nn.Module):
    """Causal self-attention of local heads and of heads with clusters.

    Parameters
    ----------
    channels : int
        Of input and output.
    heads : int
        All of them; they divide `channels`.
    clusters : int
        Centroids of each routing head.
    window : int
        Tokens that a centroid takes, and of a local head's window.
    local : int or None
        How many heads are local; half of them where None.
    decay : float
        Of the centroids' moving averages, in (0, 1].
    commit : float
        Weight of the commitment loss.
    whole : bool
        Take the best tokens of the whole text, as in the paper, so that outputs depend on what
        follows.

    Attributes
    ----------
    commitment : Tensor
        Of the last forward: how far tokens are from their centroids, to be added to the loss.

    References
    ----------
    Efficient Content-Based Sparse Attention with Routing Transformers (2020).
    """

    card: ClassVar[Card] = Card(
        name="routingtransformer",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("unstructured",),
        year=2020,
        link="https://arxiv.org/abs/2003.05997",
        status="experimental",
    )

    def __init__(
        self, channels: int, heads: int, clusters: int, window: int, local: int | None = None,
        decay: float = 0.999, commit: float = 0.25, whole: bool = False,
    ) -> None:  # fmt: skip
        for name, value in (
            ("channels", channels), ("heads", heads), ("clusters", clusters), ("window", window),
        ):  # fmt: skip
            check_count("RoutingTransformer", name, value)
        local = heads // 2 if local is None else local
        check_count("RoutingTransformer", "local", local, 0)
        check_share("RoutingTransformer", "decay", decay)
        if channels % (2 * heads) or local >= heads:
            raise UsageError(
                f"RoutingTransformer: {channels} channels make no {heads} heads of even width, or "
                f"{local} local heads leave none with clusters"
            )
        super().__init__()
        self.channels, self.heads, self.local, self.window = channels, heads, local, window
        self.decay, self.commit, self.whole = decay, commit, whole
        width, routing = channels // heads, heads - local
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, local * width, bias=False) if local else None
        self.value = nn.Linear(channels, channels, bias=False)
        self.project = nn.Linear(channels, channels, bias=False)
        means = torch.randn(routing, clusters, width)
        self.register_buffer("means", means)
        self.register_buffer("sums", means.clone())
        self.register_buffer("counts", torch.ones(routing, clusters))
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.means: Tensor
        self.sums: Tensor
        self.counts: Tensor
        self.frequencies: Tensor
        self.commitment = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, channels) to the same."""
        if x.dim() != 3 or x.shape[2] != self.channels or not x.shape[1]:
            raise UsageError(
                f"RoutingTransformer takes (batch, length, {self.channels}), not {tuple(x.shape)}"
            )
        query, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.value)
        )
        tokens = F.layer_norm(query[:, self.local :], query.shape[-1:])
        parts = (
            [self._near(x, query[:, : self.local], value[:, : self.local])] if self.local else []
        )
        parts.append(self._clustered(tokens, value[:, self.local :]))
        nearest = self.nearest(tokens.detach())
        self.commitment = self.commit * F.mse_loss(tokens, nearest)
        if self.training:
            self._move(tokens.detach())
        found = torch.cat(parts, dim=1).transpose(1, 2).flatten(2)
        projected: Tensor = self.project(found)
        return projected

    def __getstate__(self) -> dict[str, Any]:
        """Without the graph of the commitment, so that a layer in training can be copied."""
        return self.__dict__ | {"commitment": self.commitment.detach()}

    def layout(self, tokens: Tensor) -> Layout:
        """Which keys each token attends in each cluster, from tokens (batch, heads, length, width).

        One list for each head and cluster, (batch, heads * clusters) of them; empty where a token
        is not in the cluster.
        """
        scores = (tokens.detach() @ self.means.transpose(-1, -2)).transpose(-1, -2).flatten(1, 2)
        parts = self._whole(scores) if self.whole else self._prefixes(scores)
        offsets, keys = lists_of(parts)
        length = tokens.shape[2]
        return Layout.empty(length, length).with_tokens(offsets, keys, 1)

    def nearest(self, tokens: Tensor) -> Tensor:
        """The centroid nearest to each token, of its shape."""
        return self.means.expand(len(tokens), -1, -1, -1).gather(
            2, self._assigned(tokens).unsqueeze(-1).expand_as(tokens)
        )

    def _assigned(self, tokens: Tensor) -> Tensor:
        """int64 (batch, heads, length): the number of the nearest centroid."""
        products = tokens @ self.means.transpose(-1, -2)
        return (products - self.means.square().sum(-1).unsqueeze(-2) / 2).argmax(-1)

    @torch.no_grad()
    def _move(self, tokens: Tensor) -> None:
        """Moving averages of the counts and sums of each cluster; the centroid is their ratio."""
        clusters = self.means.shape[1]
        assigned = F.one_hot(self._assigned(tokens), clusters).to(tokens.dtype)
        counts = assigned.sum((0, 2))
        sums = torch.einsum("bhnc,bhnd->hcd", assigned, tokens)
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums.dtype), 1 - self.decay)
        total = self.counts.sum(-1, keepdim=True)
        smooth = (self.counts + _SMOOTHING) / (total + clusters * _SMOOTHING) * total
        self.means.copy_(self.sums / smooth.unsqueeze(-1))

    def _near(self, x: Tensor, query: Tensor, value: Tensor) -> Tensor:
        """The local heads."""
        assert self.key is not None
        places = torch.arange(x.shape[1], device=x.device)
        key = self.key(x).unflatten(-1, (self.local, -1)).transpose(1, 2)
        query, key = (rotated(part, places, self.frequencies) for part in (query, key))
        call = AttentionCall(query, key, value, query.shape[-1] ** -0.5, True)
        layout = StreamingLLM(window=self.window, sinks=0).layout(call)
        return attention(query, key, value, layout, causal=True)[0]

    def _clustered(self, tokens: Tensor, value: Tensor) -> Tensor:
        """The heads with clusters: the average over the clusters of each token."""
        clusters = self.means.shape[1]
        query = tokens.repeat_interleave(clusters, dim=1)
        found, lse = attention(query, tokens, value, self.layout(tokens), causal=True)
        inside = (lse > -torch.inf).unflatten(1, (-1, clusters)).sum(2).unsqueeze(-1)
        return found.unflatten(1, (-1, clusters)).sum(2) / (inside + _AVERAGING)

    def _prefixes(self, scores: Tensor) -> Iterator[Part]:
        """Of each place, the cluster's members as of then, where the place itself is one."""
        for part in running_top(scores, self.window):
            rows = part.kept.shape[-2]
            own = part.kept[..., -rows:].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            yield part._replace(kept=part.kept & own)

    def _whole(self, scores: Tensor) -> Iterator[Part]:
        """Of each member of a cluster of the whole text, the members up to it."""
        members = keep(scores, TopK(self.window))
        count = min(self.window, scores.shape[-1])
        order = members.nonzero()[:, -1].unflatten(0, (*scores.shape[:-1], count))
        for place in range(scores.shape[-1]):
            kept = (order <= place) & members[..., place : place + 1]
            yield Part(slice(place, place + 1), order, kept.unsqueeze(-2))
