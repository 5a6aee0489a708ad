"""GTSP: which nodes and heads stay, what a dropped one still does, and layers left out."""

import pytest
import torch

import gossamer as gs

ALL = torch.ones(1, 6, dtype=torch.bool)


def made(seed=0, width=8, **options):
    torch.manual_seed(seed)
    return gs.attention.GTSP(width, **options)


def scored(layer, x):
    """The layer with a score that is the first feature of each node."""
    with torch.no_grad():
        layer.score.weight.zero_()
        layer.score.weight[0, 0] = 1.0
    return layer


def test_each_graph_keeps_its_share_and_its_last_node():
    layer = scored(made(tokens=0.5).eval(), None)
    x = torch.zeros(3, 6, 8)
    x[0, :, 0] = torch.tensor([9.0, 1.0, 5.0, 8.0, 2.0, 7.0])
    x[1, :, 0] = torch.tensor([1.0, 2.0, 9.0, 0.0, 99.0, 99.0])
    real = torch.arange(6) < torch.tensor([[6], [4], [1]])
    kept = layer.choose(layer.score(x).squeeze(-1), real)
    assert kept[0].nonzero().flatten().tolist() == [0, 3, 5]
    assert kept[1].nonzero().flatten().tolist() == [1, 2, 3], "the last real one comes on top"
    assert kept[2].nonzero().flatten().tolist() == [0]


@torch.no_grad()
def test_a_dropped_node_leaves_the_softmax_and_keeps_its_features():
    layer = scored(made(tokens=0.5).eval(), None)
    x = torch.randn(1, 6, 8)
    x[0, :, 0] = torch.tensor([9.0, -9.0, 5.0, 8.0, -2.0, 7.0])
    found = layer(x)
    assert torch.equal(found[0, [1, 2, 4]], x[0, [1, 2, 4]])
    changed = x.clone()
    changed[0, [1, 2, 4], 1:] = 100.0
    assert torch.equal(layer(changed)[0, [0, 3, 5]], found[0, [0, 3, 5]])
    alone = made().eval()
    alone.load_state_dict(layer.state_dict())
    torch.testing.assert_close(found[:, [0, 3, 5]], alone(x[:, [0, 3, 5]]))


def test_noise_chooses_in_training_only_and_the_score_learns_there():
    layer = made(tokens=0.5)
    x = torch.randn(1, 6, 8)
    torch.manual_seed(1)
    found = {tuple(layer.choose(layer._logits(x, ALL), ALL)[0].tolist()) for _ in range(40)}
    assert len(found) > 3
    layer(x).square().sum().backward()
    assert layer.score.weight.grad.any()
    layer.zero_grad()
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer(x).square().sum().backward()
    assert layer.score.weight.grad is None or not layer.score.weight.grad.any()


def test_heads_start_at_the_density_and_a_dropped_one_is_not_computed():
    layer = made(width=16, heads=8, active=0.6, seed=3)
    assert int(layer.active.sum()) == 4
    rows = layer.active.repeat_interleave(2)
    for part in (layer.query, layer.key, layer.value):
        assert not part.weight[~rows].any() and part.weight[rows].all()
    x = torch.randn(2, 5, 16)
    seen = []
    layer(x, seen=seen).square().sum().backward()
    assert not seen[0][:, ~layer.active].any() and seen[0][:, layer.active].any()
    assert seen[0].grad[:, ~layer.active].any(), "a dropped head has a gradient to be judged by"
    assert layer.query.weight.grad[rows].any() and not layer.query.weight.grad[~rows].any()


def test_importance_is_gradient_times_output_and_noise_heads_rank_last():
    """Two heads carry the label, two carry noise of the same size."""
    torch.manual_seed(0)
    heads = torch.randn(64, 4, 5, 3)
    label = heads[:, :2].sum((1, 2, 3))
    weights = torch.tensor([1.0, 1.0, 0.02, 0.02]).reshape(1, 4, 1, 1)
    layer = made(width=12)
    seen = heads.requires_grad_()
    seen.retain_grad()
    ((seen * weights).sum((1, 2, 3)) - label - 1).square().sum().backward()
    worth, gradient = layer.importance(seen)
    expected = torch.einsum("bhnl,bhnl->bh", seen.grad, seen).abs().mean(0)
    torch.testing.assert_close(worth, expected)
    torch.testing.assert_close(gradient, seen.grad.abs().sum((2, 3)).mean(0))
    assert worth[:2].min() > 5 * worth[2:].max()


def test_rewiring_keeps_the_count_drops_the_least_and_may_bring_back():
    layer = made(width=12, heads=6, active=0.5)
    with torch.no_grad():
        layer.active.copy_(torch.tensor([True, True, True, False, False, False]))
    seen = torch.ones(1, 6, 2, 2, requires_grad=True)
    seen.grad = torch.tensor([9.0, 1.0, 5.0, 2.0, 7.0, 0.5]).reshape(1, 6, 1, 1).expand(1, 6, 2, 2)
    layer.rewire(seen, 0.5)  # drops 1 and 2, rounded up; the largest of the others are 4 and 2
    assert layer.active.tolist() == [True, False, True, False, True, False]
    rows = layer.active.repeat_interleave(2)
    assert not layer.value.weight[~rows].any()
    with pytest.raises(gs.UsageError, match="call backward"):
        layer.rewire(torch.ones(1, 6, 2, 2))
    with pytest.raises(gs.UsageError, match="gradients, which are turned off"), torch.no_grad():
        layer(torch.randn(1, 3, 12), seen=[])


def test_a_regrown_head_learns_again():
    layer = made(width=8, heads=2, active=0.5)
    off = int((~layer.active).nonzero())
    with torch.no_grad():
        layer.active.fill_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    x, wanted = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - wanted).square().mean().backward()
        optimizer.step()
    rows = slice(4 * off, 4 * off + 4)
    for part in (layer.query, layer.key, layer.value):
        assert part.weight[rows].any()


def test_a_layer_is_left_out_for_whole_graphs_and_scaled():
    layer = made(drop=0.5)
    x = torch.randn(200, 4, 8)
    torch.manual_seed(2)
    change = layer(x) - x
    out = ~change.flatten(1).any(1)
    assert 70 < int(out.sum()) < 130
    layer.eval()
    torch.testing.assert_close(change[~out], 2 * (layer(x) - x)[~out], rtol=1e-4, atol=1e-5)
    gone = made(drop=1.0)
    assert torch.equal(gone(x), x) and torch.equal(gone.eval()(x), x)


def test_a_graph_without_nodes_breaks_nothing():
    layer = made(tokens=0.5)
    real = torch.tensor([[True] * 4, [False] * 4])
    x = torch.randn(2, 4, 8, requires_grad=True)
    found = layer(x, real)
    assert torch.equal(found[1], x[1])
    found.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_weights_are_pruned_by_granet():
    torch.manual_seed(0)
    model = torch.nn.Sequential(gs.attention.GTSP(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = gs.weights.GraNet(0.25, every=2)
    with gs.sparse_training(model, optimizer, method, total_steps=20, include=("*",)) as run:
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8)).square().mean().backward()
            optimizer.step()
    assert run.density == pytest.approx(0.25, abs=0.02)
