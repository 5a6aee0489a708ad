"""SparseGraphTracker: objects of two frames exchange messages along few edges; weak ones are found.

Nodes are the best detections of this frame and of the last one, and lost tracks. Each earlier node
is joined to the few current ones that overlap it, look like it or lie near it. Messages along these
edges give each edge the probability that both ends are one object.

**Paper.** Detection Recovery in Online Multi-Object Tracking with Sparse Graph Tracker, 2022.
https://arxiv.org/abs/2205.00968

**Claim.** With CrowdHuman, MOTA 76.4 and IDF1 72.8 on MOT17, 72.8 and 70.6 on MOT20, in real time.

**Defaults.** 3 rounds of messages and edges of width 32; in `tracking`, 100 detections from a score of
0.1, 10 neighbours by each measure, thresholds of 0.4 for edges and nodes, 0.5 for new tracks and for
overlap, 0.9 of the newest appearance, and 30 frames of patience, as in the paper and its code.

**Notes.** The class is the network. `gossamer.methods.attention.tracking` builds the graph, assigns
and keeps tracks: `Tracker(network).update(detections)`. A detector is not part of it: detections come
with boxes, scores and appearance, which has the width of the nodes. Edges carry features, so
messages are not those of attention, and they are computed by torch on edges alone. Both directions
of an edge are averaged before its score. Losses are focal; the release divides the nodes' loss by
the number of objects twice, and here once.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count

RELATIONS = 6


class SparseGraphTracker(nn.Module):
    """Messages between the detections of two frames, and scores of edges and nodes.

    Parameters
    ----------
    width : int
        Of the nodes: of the appearance of a detection.
    edge_width : int
        Of the edges.
    rounds : int
        Of messages.

    References
    ----------
    Detection Recovery in Online Multi-Object Tracking with Sparse Graph Tracker (2022).
    """

    card: ClassVar[Card] = Card(
        name="sparsegraphtracker",
        topic="attention",
        role="layer",
        needs=(),
        patterns=("unstructured",),
        year=2022,
        link="https://arxiv.org/abs/2205.00968",
        status="experimental",
    )

    def __init__(self, width: int, edge_width: int = 32, rounds: int = 3) -> None:
        for name, value in (("width", width), ("edge_width", edge_width), ("rounds", rounds)):
            check_count("SparseGraphTracker", name, value)
        super().__init__()
        self.width, self.rounds = width, rounds
        self.encode = nn.Sequential(
            _layer(RELATIONS, edge_width), nn.Linear(edge_width, edge_width)
        )
        self.edge = _layer(2 * width + 2 * edge_width, edge_width)
        self.forward_message = _layer(width + edge_width, width)
        self.backward_message = _layer(width + edge_width, width)
        self.node = _layer(width, width)
        self.score_edge = nn.Sequential(_layer(edge_width, edge_width), nn.Linear(edge_width, 1))
        self.score_node = nn.Sequential(_layer(width, width), nn.Linear(width, 1))

    def forward(
        self, previous: Tensor, current: Tensor, relations: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of the pairs (n,) and of the current nodes (m,).

        previous: (k, width) and current: (m, width), appearances. pairs: int64 (2, n), a previous
        and a current node each. relations: (n, 6), how the current one differs: centre x and y,
        logarithms of width and height, cosine, overlap. Seen from the current one the first four
        change their sign.
        """
        self._check(previous, current, relations, pairs)
        earlier, later = pairs
        signs = relations.new_tensor([-1, -1, -1, -1, 1, 1])
        first = onward, back = self.encode(relations), self.encode(relations * signs)
        for _ in range(self.rounds):
            old, new = previous[earlier], current[later]
            onward = self.edge(torch.cat([new, old, first[0], onward], dim=-1))
            back = self.edge(torch.cat([old, new, first[1], back], dim=-1))
            to_current = self.forward_message(torch.cat([old, onward], dim=-1))
            to_previous = self.backward_message(torch.cat([new, back], dim=-1))
            current = self.node(_mean(to_current, later, len(current)))
            previous = self.node(_mean(to_previous, earlier, len(previous)))
        edges = self.score_edge((onward + back) / 2).squeeze(-1)
        return edges, self.score_node(current).squeeze(-1)

    def _check(self, previous: Tensor, current: Tensor, relations: Tensor, pairs: Tensor) -> None:
        for name, x in (("previous", previous), ("current", current)):
            if x.dim() != 2 or x.shape[1] != self.width:
                raise UsageError(
                    f"SparseGraphTracker: {name} is (nodes, {self.width}), not {tuple(x.shape)}"
                )
        if pairs.dtype != torch.int64 or pairs.dim() != 2 or len(pairs) != 2:
            raise UsageError(
                f"SparseGraphTracker: pairs are int64 (2, n), not {pairs.dtype} "
                f"{tuple(pairs.shape)}"
            )
        if relations.shape != (pairs.shape[1], RELATIONS):
            raise UsageError(
                f"SparseGraphTracker: relations are ({pairs.shape[1]}, {RELATIONS}), not "
                f"{tuple(relations.shape)}"
            )
        for name, row, x in (("previous", pairs[0], previous), ("current", pairs[1], current)):
            if row.numel() and not (int(row.min()) >= 0 and int(row.max()) < len(x)):
                raise UsageError(
                    f"SparseGraphTracker: pairs name {name} nodes {int(row.min())} to "
                    f"{int(row.max())}, and there are {len(x)}"
                )


def losses(
    edges: Tensor, nodes: Tensor, same: Tensor, objects: Tensor, weight: float = 10.0
) -> Tensor:
    """Focal loss of edges, and `weight` times that of nodes; each over the number of true ones.

    edges, nodes: logits. same: (n,), 1.0 where both ends are one object; objects: (m,), 1.0 for
    nodes that are objects. Leave out edges of which neither end is an object, as the release does.
    """
    return _focal(edges, same) + weight * _focal(nodes, objects)


def _focal(logits: Tensor, truth: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    surprise = nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    chance = logits.sigmoid()
    wrong = chance * (1 - truth) + (1 - chance) * truth
    balance = alpha * truth + (1 - alpha) * (1 - truth)
    return (balance * wrong**gamma * surprise).sum() / truth.sum().clamp(min=1)


def _mean(messages: Tensor, receivers: Tensor, nodes: int) -> Tensor:
    """The mean of each node's messages, (nodes, width); 0 for a node without any."""
    total = messages.new_zeros(nodes, messages.shape[1]).index_add(0, receivers, messages)
    count = torch.bincount(receivers, minlength=nodes).clamp(min=1)
    return total / count.unsqueeze(-1)


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU())
