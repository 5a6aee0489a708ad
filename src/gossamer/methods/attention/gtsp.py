"""GTSP: graph transformers without some of their tokens, heads, layers and weights.

A learned score chooses the nodes of each graph that take part in attention. Heads are dropped by what
the loss loses with them, and regrown by their gradient. While training, whole layers are left out at
random, so that a shallower network remains usable.

**Paper.** Exploring Sparsity in Graph Transformers, 2023. https://arxiv.org/abs/2312.05479

**Claim.** 30% fewer FLOPs and 1.8% more AUC on OGBG-HIV; tried on GraphTrans, Graphormer and
GraphGPS.

**Defaults.** 4 heads; densities of 1, which prune nothing. The paper tries 0.25, 0.5 and 0.75.

**Notes.** The class is the attention of a layer with its residual; norms, feed-forward layers and
local messages are the network's. Dropped nodes leave the softmax and are not computed. The release
sets their features to 0, so that they stay in every softmax as keys of logit 0. Each graph keeps a
share of its own nodes, rounded down, at least one, and its last real node always. The release takes
the share of the longest graph, padding included. Gumbel noise chooses in training only, and the
score learns through a straight-through gradient at the nodes that are kept. Heads are judged by
their outputs before the last projection, where they still are heads. The release looks behind it.
To judge, give forward a list, and after `backward` call `rewire` with it. Weights of a dropped head
are set to 0, as in the release. `drop=1` leaves the whole layer out. Weights are pruned and regrown by
`gs.weights.GraNet`, which is the paper's schedule.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count, check_share
from gossamer.ops.select import keep


class GTSP(nn.Module):
    """Attention over the nodes of graphs, with prunable nodes, heads and depth.

    Parameters
    ----------
    width : int
        Of input and output.
    heads : int
        Of the attention; divides `width`.
    tokens : float
        The share of each graph's nodes that take part.
    active : float
        The share of heads that are active, rounded down, at least one.
    drop : float
        How likely the layer is left out for a graph in training; with 1 it always is.
    seed : int
        Of the heads that are active at first.

    References
    ----------
    Exploring Sparsity in Graph Transformers (2023).
    """

    card: ClassVar[Card] = Card(
        name="gtsp",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("unstructured",),
        year=2023,
        link="https://arxiv.org/abs/2312.05479",
        status="experimental",
    )

    def __init__(
        self, width: int, heads: int = 4, tokens: float = 1.0, active: float = 1.0,
        drop: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        check_count("GTSP", "width", width)
        check_count("GTSP", "heads", heads)
        check_share("GTSP", "tokens", tokens)
        check_share("GTSP", "active", active)
        if width % heads or not 0 <= drop <= 1:
            raise UsageError(
                f"GTSP: {heads} heads divide the width, not {width}, and drop is in [0, 1], not "
                f"{drop!r}"
            )
        super().__init__()
        self.width, self.heads, self.tokens, self.drop = width, heads, tokens, drop
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project, self.score = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
        count = max(1, math.floor(active * heads + 1e-9))
        self.register_buffer("active", torch.isin(torch.arange(heads), order[:count]))
        self.active: Tensor
        self._silence()

    def forward(
        self, x: Tensor, real: Tensor | None = None, seen: list[Tensor] | None = None
    ) -> Tensor:
        """(batch, nodes, width) to the same; the input of nodes that take no part stays.

        real: bool (batch, nodes), False for padding. seen: a list to which the outputs of heads are
        appended, for `rewire`.
        """
        real = self._check(x, real)
        if self.drop == 1:
            return x
        logits = self._logits(x, real)
        kept = self.choose(logits, real)
        here, there = _gathered(kept)
        strength = self._strength(logits, real, kept).unsqueeze(-1)
        part = (x * strength).gather(1, here.unsqueeze(-1).expand(-1, -1, self.width))
        heads = self._attend(part, there)
        if seen is not None:
            if not heads.requires_grad:
                raise UsageError("GTSP: heads are judged by gradients, which are turned off here")
            heads.retain_grad()
            seen.append(heads)
        change = self.project(heads.transpose(1, 2).flatten(2)) * there.unsqueeze(-1)
        if self.training and self.drop:
            stays = torch.rand(len(x), 1, 1, device=x.device) >= self.drop
            change = change * stays / (1 - self.drop)
        return x.scatter_add(1, here.unsqueeze(-1).expand_as(change), change)

    def choose(self, logits: Tensor, real: Tensor) -> Tensor:
        """bool (batch, nodes): each graph's nodes of the highest logits, and its last one."""
        hidden = logits.detach().masked_fill(~real, -torch.inf)
        ranks = hidden.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = (self.tokens * real.sum(1, keepdim=True) + 1e-9).floor().clamp(min=1)
        place = torch.arange(real.shape[1], device=real.device)
        last = (place * real).amax(1, keepdim=True)
        return ((ranks < count) | (place == last)) & real

    def importance(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of each head, (heads,): |sum of gradient times output|, and the gradient's 1-norm.

        Both are means over the batch. seen: what forward appended, after `backward`.
        """
        if seen.grad is None:
            raise UsageError("GTSP: no gradient yet; call backward on the loss first")
        worth = (seen.grad * seen.detach()).sum((2, 3)).abs().mean(0)
        return worth, seen.grad.abs().sum((2, 3)).mean(0)

    @torch.no_grad()
    def rewire(self, seen: Tensor, share: float = 0.5) -> None:
        """Drop the active heads of the least worth, and regrow as many of the largest gradient.

        share: of the active heads, rounded up. A head that was just dropped may come back. Dropped
        heads are set to 0; an optimizer's momentum of theirs is yours to clear.
        """
        check_share("GTSP", "share", share)
        worth, gradient = self.importance(seen)
        count = math.ceil(share * int(self.active.sum()) - 1e-9)
        least = keep((-worth).masked_fill(~self.active, -torch.inf), TopK(count))
        left = self.active & ~least
        grown = keep(gradient.masked_fill(left, -torch.inf), TopK(count))
        self.active.copy_(left | grown)
        self._silence()

    @torch.no_grad()
    def _silence(self) -> None:
        """Set weights of heads that are not active to 0; through biases they can learn again."""
        rows = self.active.repeat_interleave(self.width // self.heads)
        for layer in (self.query, self.key, self.value):
            layer.weight.mul_(rows.unsqueeze(1))

    def _check(self, x: Tensor, real: Tensor | None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.width or not x.shape[1]:
            raise UsageError(f"GTSP takes (batch, nodes, {self.width}), not {tuple(x.shape)}")
        if real is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if real.dtype != torch.bool or real.shape != x.shape[:2]:
            raise UsageError(
                f"GTSP: real is bool {tuple(x.shape[:2])}, not {real.dtype} {tuple(real.shape)}"
            )
        return real

    def _logits(self, x: Tensor, real: Tensor) -> Tensor:
        """log-softmax of the scores over each graph's nodes; with Gumbel noise in training."""
        counted = real | ~real.any(1, keepdim=True)  # an empty graph has no softmax to break
        scores = self.score(x).squeeze(-1).masked_fill(~counted, -torch.inf)
        logits = scores.log_softmax(1)
        if not self.training:
            return logits
        return logits - torch.empty_like(logits).exponential_().log()

    def _strength(self, logits: Tensor, real: Tensor, kept: Tensor) -> Tensor:
        """1 for kept nodes, else 0; in training with the gradient of the softmax of logits."""
        hard = kept.to(logits.dtype)
        if not self.training:
            return hard
        soft = logits.softmax(1).where(real, 0)
        return hard + soft - soft.detach()

    def _attend(self, part: Tensor, there: Tensor) -> Tensor:
        """Outputs of all heads, (batch, heads, nodes, width of a head); 0 for those not active."""
        rows = self.active.repeat_interleave(self.width // self.heads)
        count = int(self.active.sum())
        query, key, value = (
            F.linear(part, layer.weight[rows], layer.bias[rows])
            .unflatten(-1, (count, -1))
            .transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask = there[:, None, None, :] | ~there.any(1)[:, None, None, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        whole = found.new_zeros(len(part), self.heads, part.shape[1], self.width // self.heads)
        return whole.index_copy(1, self.active.nonzero()[:, 0], found)


def _gathered(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Places (batch, most kept nodes) of kept nodes, ascending, and bool for those that are."""
    count = kept.sum(1, keepdim=True)
    most = max(1, int(count.max()))
    places = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    return places, torch.arange(most, device=kept.device) < count
