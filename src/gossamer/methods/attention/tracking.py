"""Tracks from detections: the sparse graph between frames, assignment, and what is remembered.

`Tracker.update` takes one frame's detections after another. Detections far below the usual threshold
take part. Those that an edge joins to a track are recovered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.core.budget import TopK
from gossamer.core.errors import MissingExtra, UsageError
from gossamer.methods.attention.sparse_graph_tracker import SparseGraphTracker
from gossamer.methods.attention.tiles import check_count
from gossamer.ops.select import keep


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes of one frame.

    Attributes
    ----------
    boxes : Tensor
        (n, 4): left, top, right, bottom, in pixels.
    scores : Tensor
        (n,), in [0, 1].
    appearance : Tensor
        (n, width), of the network's width.
    image : tuple of float
        Width and height of the image, in pixels.
    """

    boxes: Tensor
    scores: Tensor
    appearance: Tensor
    image: tuple[float, float]

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.scores.dim() != 1:
            raise UsageError(
                f"detections have boxes (n, 4) and scores (n,), not {tuple(self.boxes.shape)} and "
                f"{tuple(self.scores.shape)}"
            )
        if self.appearance.dim() != 2 or len(self.appearance) != count:
            raise UsageError(f"appearance is ({count}, width), not {tuple(self.appearance.shape)}")
        if not min(self.image) > 0:
            raise UsageError(f"an image has a width and a height above 0, not {self.image}")
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        if not bool((sides > 0).all()) or not bool(self.scores.isfinite().all()):
            raise UsageError("a box's right and bottom are beyond its left and top, scores finite")

    def __getitem__(self, places: Tensor) -> Detections:
        return replace(
            self, boxes=self.boxes[places], scores=self.scores[places],
            appearance=self.appearance[places],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tracked:
    """What one frame became: `identity` int64 (n,), `boxes` (n, 4), `recovered` bool (n,).

    recovered: whether the detection's score alone would not have begun a track.
    """

    identity: Tensor
    boxes: Tensor
    recovered: Tensor


def candidates(detections: Detections, count: int = 100, least: float = 0.1) -> Detections:
    """The `count` best detections with a score from `least`; fewer where there are no more."""
    scores = detections.scores.masked_fill(detections.scores < least, -torch.inf)
    return detections[keep(scores, TopK(count))]


def neighbours(previous: Detections, current: Detections, count: int = 10) -> Tensor:
    """int64 (2, n): each previous node's `count` nearest by overlap, by cosine and by distance.

    The union, sorted, no pair twice.
    """
    check_count("SparseGraphTracker", "neighbours", count)
    distance = torch.cdist(_centres(previous), _centres(current))
    joined = torch.zeros_like(distance, dtype=torch.bool)
    for closeness in (overlap(previous, current), cosine(previous, current), -distance):
        joined |= keep(closeness, TopK(count))
    return joined.nonzero().t()


def relations(previous: Detections, current: Detections, pairs: Tensor) -> Tensor:
    """(n, 6): how the current node of each pair differs from the previous one."""
    old, new = previous[pairs[0]], current[pairs[1]]
    size = old.boxes.new_tensor(current.image)
    moved = (_centres(new) - _centres(old)) / size
    grown = (_sides(new) / _sides(old)).log()
    alike = torch.stack(
        [cosine(previous, current)[pairs[0], pairs[1]], overlap(previous, current)[pairs[0], pairs[1]]],
        dim=1,
    )  # fmt: skip
    return torch.cat([moved, grown, alike], dim=1)


def overlap(one: Detections, other: Detections) -> Tensor:
    """Intersection over union of all pairs, (n, m)."""
    a, b = one.boxes.unsqueeze(1), other.boxes.unsqueeze(0)
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(
        min=0
    )
    both = inside.prod(-1)
    return both / (_sides(one).prod(-1).unsqueeze(1) + _sides(other).prod(-1) - both)


def cosine(one: Detections, other: Detections) -> Tensor:
    """Of the appearances of all pairs, (n, m)."""
    a, b = (torch.nn.functional.normalize(x.appearance, dim=1) for x in (one, other))
    return a @ b.t()


def assign(gain: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pairs that together gain most; pairs without gain stay apart.

    Raises MissingExtra where scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("scipy", "graphs") from None
    positive = gain.clamp(min=0)
    found = linear_sum_assignment(positive.cpu().numpy(), maximize=True)
    rows, columns = (torch.from_numpy(x).to(gain.device) for x in found)
    worth = positive[rows, columns] > 0
    return rows[worth], columns[worth]


@dataclass(frozen=True)
class TrackerOptions:
    """How tracks are made.

    Parameters
    ----------
    detections : int
        Of a frame, at most, by score.
    neighbours : int
        Of each previous node, by each of three measures.
    least : float
        The lowest score that takes part.
    begin : float
        The lowest score that begins a track.
    edge, node : float
        The lowest probability of a match, and of a recovered detection to be an object.
    overlap : float
        The least overlap of what is matched by overlap alone, after the edges.
    newest : float
        The share of the newest appearance in a track's.
    patience : int
        Frames after which a lost track ends.
    """

    detections: int = 100
    neighbours: int = 10
    least: float = 0.1
    begin: float = 0.5
    edge: float = 0.4
    node: float = 0.4
    overlap: float = 0.5
    newest: float = 0.9
    patience: int = 30

    def __post_init__(self) -> None:
        for name in ("detections", "neighbours", "patience"):
            check_count("SparseGraphTracker", name, getattr(self, name))
        for name in ("least", "begin", "edge", "node", "overlap", "newest"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(
                    f"SparseGraphTracker: {name} is in [0, 1], not {getattr(self, name)!r}"
                )


class Tracker:
    """Online tracking of one video.

    Parameters
    ----------
    network : SparseGraphTracker
        Trained; it is used without gradients.
    options : TrackerOptions
        How tracks are made.
    """

    def __init__(self, network: SparseGraphTracker, options: TrackerOptions | None = None) -> None:
        self.network, self.options = network, options or TrackerOptions()
        self.nodes: Detections | None = None  # of the last frame, then lost tracks
        self.identity = torch.zeros(0, dtype=torch.int64)  # of each node, -1 for none
        self.lost = torch.zeros(0, dtype=torch.int64)  # frames since each was seen
        self.known = 0

    @torch.no_grad()
    def update(self, detections: Detections) -> Tracked:
        """Take the next frame, and return what is tracked in it."""
        o = self.options
        current = candidates(detections, o.detections, o.least)
        identity = torch.full((len(current.scores),), -1, dtype=torch.int64)
        strong = current.scores >= o.begin
        if self.nodes is not None and len(self.nodes.scores) and len(identity):
            current = self._match(self.nodes, current, identity, strong)
        new = strong & (identity < 0)
        identity[new] = torch.arange(self.known, self.known + int(new.sum()))
        self.known += int(new.sum())
        self._remember(current, identity)
        seen = identity >= 0
        return Tracked(identity[seen], current.boxes[seen], ~strong[seen])

    def _match(
        self, previous: Detections, current: Detections, identity: Tensor, strong: Tensor
    ) -> Detections:
        """Fill in identities; the current nodes with appearances that take after their tracks'."""
        o = self.options
        pairs = neighbours(previous, current, o.neighbours)
        related = relations(previous, current, pairs)
        edges, nodes = self.network(previous.appearance, current.appearance, related, pairs)
        gain = torch.zeros(len(previous.scores), len(identity))
        gain[pairs[0], pairs[1]] = edges.sigmoid() - o.edge
        gain[self.identity < 0] = 0
        old, new = assign(gain)
        sure = strong[new] | (nodes.sigmoid()[new] >= o.node)
        old, new = old[sure], new[sure]
        taken = torch.zeros(len(previous.scores), dtype=torch.bool)
        taken[old] = True
        identity[new] = self.identity[old]
        left, right = ~taken & (self.identity >= 0), strong & (identity < 0)
        gain = (overlap(previous, current) - o.overlap) * (left.unsqueeze(1) & right)
        more = assign(gain)
        identity[more[1]] = self.identity[more[0]]
        old, new = torch.cat([old, more[0]]), torch.cat([new, more[1]])
        mixed = o.newest * current.appearance[new] + (1 - o.newest) * previous.appearance[old]
        appearance = current.appearance.clone()
        appearance[new] = torch.nn.functional.normalize(mixed, dim=1)
        return replace(current, appearance=appearance)

    def _remember(self, current: Detections, identity: Tensor) -> None:
        """This frame's nodes, then the tracks that it did not have, for as long as is patient."""
        nodes, lost = current, torch.zeros(len(identity), dtype=torch.int64)
        if self.nodes is not None:
            missing = (self.identity >= 0) & ~torch.isin(self.identity, identity)
            missing &= self.lost < self.options.patience
            old = self.nodes[missing]
            nodes = replace(
                current,
                boxes=torch.cat([current.boxes, old.boxes]),
                scores=torch.cat([current.scores, old.scores]),
                appearance=torch.cat([current.appearance, old.appearance]),
            )
            identity = torch.cat([identity, self.identity[missing]])
            lost = torch.cat([lost, self.lost[missing] + 1])
        self.nodes, self.identity, self.lost = nodes, identity, lost


def _sides(x: Detections) -> Tensor:
    return x.boxes[:, 2:] - x.boxes[:, :2]


def _centres(x: Detections) -> Tensor:
    return (x.boxes[:, 2:] + x.boxes[:, :2]) / 2
