"""Tracks: the graph between frames, what is recovered, and what is refused."""

import sys
from dataclasses import replace

import pytest
import torch

import gossamer as gs
from gossamer.methods.attention.sparse_graph_tracker import losses
from gossamer.methods.attention.tracking import (
    Detections,
    Tracker,
    TrackerOptions,
    assign,
    candidates,
    cosine,
    neighbours,
    overlap,
    relations,
)

IMAGE = (400.0, 300.0)


def detections(boxes, scores=None, appearance=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.full((len(boxes),), 0.9) if scores is None else torch.tensor(scores)
    appearance = torch.eye(max(4, len(boxes)))[: len(boxes)] if appearance is None else appearance
    return Detections(boxes, scores, appearance, IMAGE)


def many(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([350.0, 250.0])
    sides = 10 + 30 * torch.rand(count, 2, generator=generator)
    return Detections(
        torch.cat([corner, corner + sides], 1), torch.rand(count, generator=generator),
        torch.randn(count, 8, generator=generator), IMAGE,
    )  # fmt: skip


def by_looks(previous, current, related, pairs):
    """In the place of a trained network: edges by cosine, every node an object."""
    return 20 * (related[:, 4] - 0.7), torch.full((len(current),), 5.0)


def test_overlap_is_that_of_rectangles():
    one = detections([[0, 0, 10, 10], [20, 20, 30, 40]])
    other = detections([[5, 0, 15, 10], [0, 0, 10, 10], [10, 0, 20, 10]])
    torch.testing.assert_close(overlap(one, other), torch.tensor([[1 / 3, 1, 0], [0, 0, 0]]))


def test_candidates_are_the_best_however_low_and_no_more_than_there_are():
    found = candidates(many(300), 100, 0.1)
    assert len(found.scores) == 100 and found.scores.min() > 0.5
    low = candidates(many(60), 100, 0.1)
    assert 50 < len(low.scores) < 60 and 0.1 <= low.scores.min() < 0.2
    assert len(candidates(many(60), 100, 1.0).scores) == 0


def test_edges_are_a_union_without_doubles_and_far_fewer_than_all():
    previous, current = many(100, 1), many(100, 2)
    pairs = neighbours(previous, current, 10)
    assert torch.equal(pairs.unique(dim=1), pairs)
    counts = torch.bincount(pairs[0])
    assert counts.min() >= 10 and counts.max() <= 30 and pairs.shape[1] < 0.3 * 100 * 100
    for closeness in (overlap(previous, current), cosine(previous, current)):
        best = closeness.argmax(1)
        assert all([i, int(best[i])] in pairs.T.tolist() for i in range(100))
    assert neighbours(many(3, 1), many(2, 2), 10).shape == (2, 6), "no more than there are"


def test_relations_change_their_sign_with_the_direction():
    previous, current = many(5, 1), many(4, 2)
    pairs = neighbours(previous, current, 2)
    there = relations(previous, current, pairs)
    back = relations(current, previous, pairs.flip(0))
    torch.testing.assert_close(there[:, :4], -back[:, :4])
    torch.testing.assert_close(there[:, 4:], back[:, 4:])
    moved = replace(previous, boxes=previous.boxes + torch.tensor([40.0, 0.0, 40.0, 0.0]))
    same = relations(previous, moved, torch.arange(5).expand(2, 5))
    wanted = torch.tensor([0.1, 0.0, 0.0, 0.0, 1.0]).expand(5, 5)
    torch.testing.assert_close(same[:, :5], wanted, rtol=0, atol=1e-5)


def test_messages_have_a_direction():
    """Both directions of an edge are averaged; messages of the two have weights of their own."""
    previous, current = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    pairs, signs = torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([-1, -1, -1, -1, 1, 1])
    related = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    for rounds in (1, 2):
        torch.manual_seed(0)
        net = gs.attention.SparseGraphTracker(8, 4, rounds).eval()
        edges, _ = net(previous, current, related, pairs)
        swapped, _ = net(current, previous, related * signs, pairs)
        assert torch.allclose(edges, swapped) == (rounds == 1)
        flat, _ = net(previous, current, related * signs, pairs)
        assert not torch.allclose(edges, flat)


def test_a_weak_detection_is_recovered_through_its_edge_and_not_without():
    """Two objects cross; one is nearly hidden for two frames. Its score falls below the threshold."""
    frames = [
        detections([[20 + 8 * t, 50, 50 + 8 * t, 110], [140 - 8 * t, 60, 170 - 8 * t, 120]], scores)
        for t, scores in enumerate([[0.9, 0.9], [0.9, 0.8], [0.9, 0.2], [0.9, 0.15], [0.9, 0.9]])
    ]
    tracker = Tracker(by_looks)
    found = [tracker.update(frame) for frame in frames]
    assert [x.identity.tolist() for x in found] == [[0, 1]] * 5
    assert [x.recovered.tolist() for x in found] == [
        [False, False], [False, False], [False, True], [False, True], [False, False],
    ]  # fmt: skip
    strict = Tracker(by_looks, TrackerOptions(least=0.5))
    found = [strict.update(frame) for frame in frames]
    assert [len(x.identity) for x in found] == [2, 2, 1, 1, 2]
    assert found[-1].identity.tolist() == [0, 1], "a lost track is found again"


def test_a_node_that_is_no_object_is_not_recovered():
    def doubtful(previous, current, related, pairs):
        edges, nodes = by_looks(previous, current, related, pairs)
        return edges, torch.full_like(nodes, -5.0)

    frames = [detections([[20, 50, 50, 110]], [s]) for s in (0.9, 0.2, 0.9)]
    tracker = Tracker(doubtful)
    found = [tracker.update(frame).identity.tolist() for frame in frames]
    assert found == [[0], [], [0]], "strong detections need no node score"


def test_what_looks_unlike_is_matched_by_overlap_alone_when_it_is_strong():
    looks = torch.eye(4)
    frames = [
        detections([[20, 50, 50, 110]], [0.9], looks[:1]),
        detections([[22, 50, 52, 110]], [0.9], looks[1:2]),
        detections([[24, 50, 54, 110]], [0.3], looks[2:3]),
        detections([[200, 50, 230, 110]], [0.9], looks[3:4]),
    ]
    tracker = Tracker(by_looks)
    assert [tracker.update(frame).identity.tolist() for frame in frames] == [[0], [0], [], [1]]


def test_appearances_are_mixed_and_lost_tracks_end():
    looks = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0, 0], [1.0, 0.2, 0, 0]]), dim=1)
    tracker = Tracker(by_looks, TrackerOptions(patience=2))
    tracker.update(detections([[20, 50, 50, 110]], [0.9], looks[:1]))
    tracker.update(detections([[20, 50, 50, 110]], [0.9], looks[1:]))
    mixed = 0.9 * looks[1] + 0.1 * looks[0]
    torch.testing.assert_close(tracker.nodes.appearance[0], mixed / mixed.norm())
    nothing = detections([], [])
    for _ in range(2):
        tracker.update(nothing)
        assert tracker.identity.tolist() == [0]
    tracker.update(nothing)
    assert tracker.identity.tolist() == []
    again = tracker.update(detections([[20, 50, 50, 110]], [0.9], looks[1:]))
    assert again.identity.tolist() == [1]


def test_candidates_without_identity_take_part_but_lend_none():
    tracker = Tracker(by_looks)
    assert tracker.update(detections([[20, 50, 50, 110]], [0.3])).identity.tolist() == []
    assert len(tracker.nodes.scores) == 1
    assert tracker.update(detections([[20, 50, 50, 110]], [0.9])).identity.tolist() == [0]


def test_assignment_is_of_the_largest_sum_and_leaves_what_gains_nothing():
    gain = torch.tensor([[0.5, 0.4], [0.45, -0.1], [-0.2, -0.3]])
    rows, columns = assign(gain)
    assert rows.tolist() == [0, 1] and columns.tolist() == [1, 0]
    rows, _ = assign(torch.full((2, 3), -1.0))
    assert not rows.numel() and not assign(torch.zeros(0, 3))[0].numel()


def test_losses_are_focal_and_over_the_true_ones():
    logits, truth = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    p = logits.sigmoid()
    wanted = 0.25 * (1 - p[0]) ** 2 * -p[0].log()
    wanted = wanted + (0.75 * p[1:] ** 2 * -(1 - p[1:]).log()).sum()
    none = torch.zeros(0)
    torch.testing.assert_close(losses(logits, none, truth, none), wanted)
    torch.testing.assert_close(losses(none, logits, none, truth), 10 * wanted)
    assert losses(logits, none, torch.zeros(3), none).isfinite()


def test_empty_frames_and_bad_ones(monkeypatch):
    torch.manual_seed(0)
    tracker = Tracker(gs.attention.SparseGraphTracker(4).eval())
    for frame in (detections([], []), detections([[0, 0, 9, 9]]), detections([], [])):
        tracker.update(frame)
    for bad in (
        lambda: detections([[0, 0, 0, 9]]),
        lambda: detections([[0, 0, 9, 9]], [float("nan")]),
        lambda: replace(detections([[0, 0, 9, 9]]), scores=torch.ones(2)),
        lambda: replace(detections([[0, 0, 9, 9]]), appearance=torch.ones(2, 4)),
        lambda: replace(detections([[0, 0, 9, 9]]), image=(0.0, 9.0)),
        lambda: TrackerOptions(edge=1.5),
        lambda: TrackerOptions(patience=0),
    ):
        with pytest.raises(gs.UsageError):
            bad()
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(gs.core.errors.MissingExtra, match=r"gossamer\[graphs\]"):
        assign(torch.ones(1, 1))
