"""Meshes: which edges each augmentation gives, and what attention along them does."""

import sys

import pytest
import torch
from scipy.spatial import Delaunay

import gossamer as gs
from gossamer.methods.attention import adjacency
from gossamer.ops.attention import attention


def triangulation(nodes=60, seed=0):
    """(edges, positions) of random points."""
    points = torch.rand(
        nodes, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    cells = torch.from_numpy(Delaunay(points.numpy()).simplices.astype("int64"))
    return adjacency.from_cells(cells), points.float()


def matrix(edges, nodes):
    found = torch.zeros(nodes, nodes, dtype=torch.bool)
    found[edges[0], edges[1]] = True
    assert int(found.sum()) == edges.shape[1], "an edge twice"
    return found


def test_sides_of_cells_count_once_and_both_ways():
    edges = adjacency.from_cells(torch.tensor([[0, 1, 2], [2, 1, 3]]))
    assert edges.shape == (2, 10)
    assert edges.T.tolist() == sorted(edges.T.tolist())
    square = adjacency.from_cells(torch.tensor([[0, 1, 2, 3]]))
    assert [0, 2] not in square.T.tolist() and square.shape == (2, 8)
    edges, _ = triangulation()
    found = matrix(edges, 60)
    assert torch.equal(found, found.T) and not found.diagonal().any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_hops_are_the_pattern_of_powers(count):
    edges, _ = triangulation()
    one = matrix(edges, 60).double()
    total, power = torch.zeros(60, 60).double(), torch.eye(60).double()
    for _ in range(count):
        power = power @ one
        total = total + power
    wanted = (total > 0).fill_diagonal_(False)
    assert torch.equal(matrix(adjacency.hops(edges, 60, count), 60), wanted)


def test_edges_grow_fast_with_hops():
    edges, _ = triangulation(500)
    counts = [adjacency.hops(edges, 500, k).shape[1] for k in (1, 2, 3)]
    assert 5 < counts[0] / 500 < 6.1 and counts[1] > 2.5 * counts[0] and counts[2] > 5 * counts[0]
    layout = adjacency.layout_of(adjacency.hops(edges, 500, 2), 500)
    assert layout.density() == pytest.approx(counts[1] / 500**2)


def test_random_edges_are_symmetric_and_as_many_as_the_share():
    edges, _ = triangulation(500)
    more = adjacency.with_random(edges, 500, 0.5, torch.Generator().manual_seed(0))
    found = matrix(more, 500)
    assert torch.equal(found, found.T) and (found | ~matrix(edges, 500)).all()
    assert 1.45 < more.shape[1] / edges.shape[1] <= 1.5
    assert torch.equal(adjacency.with_random(edges, 500, 0.0, torch.Generator()), edges)


def test_windows_run_over_an_order_that_keeps_neighbours_near():
    edges, _ = triangulation(300)
    order = adjacency.banded_order(edges, 300)
    assert torch.equal(order.sort().values, torch.arange(300))
    place = order.argsort()
    spread = (place[edges[0]] - place[edges[1]]).abs().max()
    assert spread < (edges[0] - edges[1]).abs().max() / 3
    more = matrix(adjacency.dilated(edges, 300, window=2, levels=3), 300)
    steps = (place.unsqueeze(1) - place).abs()
    wanted = torch.isin(steps, torch.tensor([1, 2, 4, 8])) | matrix(edges, 300)
    assert torch.equal(more, wanted)


def test_global_nodes_join_all_and_shorten_every_path():
    edges, _ = triangulation(300)
    more = matrix(adjacency.with_global(edges, 300, 4), 300)
    assert torch.equal(more, more.T) and not more.diagonal().any()
    assert int((more.sum(1) == 299).sum()) == 4
    assert ((more.float() @ more.float() > 0) | more).all(), "two steps reach all"


def test_augmentations_of_tiny_meshes():
    none = torch.zeros(2, 0, dtype=torch.int64)
    for nodes in (1, 2, 3):
        for found in (
            adjacency.hops(none, nodes, 3),
            adjacency.dilated(none, nodes, 2, 5),
            adjacency.with_global(none, nodes, 9),
            adjacency.with_random(none, nodes, 0.5, torch.Generator()),
        ):
            matrix(found, nodes)
            adjacency.layout_of(found, nodes)


def test_rows_are_normalised_and_a_node_alone_gets_zero():
    edges, _ = triangulation(40)
    layout = adjacency.layout_of(edges, 41)
    query, key = torch.randn(2, 1, 2, 41, 8).unbind(0)
    output, lse = attention(query, key, torch.ones(1, 2, 41, 3), layout)
    torch.testing.assert_close(output[:, :, :40], torch.ones(1, 2, 40, 3))
    assert not output[:, :, 40].any() and (lse[:, :, 40] == -torch.inf).all()
    torch.manual_seed(0)
    model = gs.attention.MeshTransformer(3, 1, width=8, layers=2, heads=2)
    x = torch.randn(2, 41, 3, requires_grad=True)
    model(x, layout).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_a_node_sees_as_far_as_layers_times_hops():
    node = torch.arange(20)
    path = adjacency.both_ways(torch.stack([node[:-1], node[1:]]))
    torch.manual_seed(0)
    model = gs.attention.MeshTransformer(1, 1, width=8, layers=2, heads=2)
    for count in (1, 3):
        layout = adjacency.layout_of(adjacency.hops(path, 20, count), 20)
        x = torch.randn(1, 20, 1, requires_grad=True)
        model(x, layout)[0, 0].sum().backward()
        assert x.grad[0, :, 0].nonzero().max() == 2 * count


def test_a_rollout_adds_changes_and_keeps_other_features():
    edges, points = triangulation(30)
    layout = adjacency.layout_of(edges, 30)
    torch.manual_seed(0)
    model = gs.attention.MeshTransformer(3, 1, width=8, layers=1, heads=2).eval()
    x = torch.cat([torch.randn(30, 1), points], dim=1).unsqueeze(0)
    found = model.rollout(x, layout, 3)
    assert found.shape == (3, 1, 30, 1)
    field = x[..., :1]
    for step in range(3):
        field = field + model(torch.cat([field, x[..., 1:]], -1), layout)
        torch.testing.assert_close(found[step], field)
    with pytest.raises(gs.UsageError, match="steps"):
        model.rollout(x, layout, 0)


def test_what_is_no_mesh_is_refused(monkeypatch):
    edges, _ = triangulation(30)
    for bad in (
        lambda: adjacency.layout_of(edges, 29),
        lambda: adjacency.layout_of(edges.float(), 30),
        lambda: adjacency.hops(edges, 30, 0),
        lambda: adjacency.from_cells(torch.zeros(3, 1, dtype=torch.int64)),
        lambda: adjacency.with_random(edges, 30, -1.0, torch.Generator()),
        lambda: adjacency.with_global(edges, 30, 0),
        lambda: adjacency.dilated(edges, 30, levels=0),
    ):
        with pytest.raises(gs.UsageError):
            bad()
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(gs.core.errors.MissingExtra, match=r"gossamer\[graphs\]"):
        adjacency.dilated(edges, 30)
