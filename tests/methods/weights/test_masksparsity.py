"""MaskSparsity: the pull reaches marked scales only, and the end is what is cut out."""

import pytest
import torch
from torch import nn

import gossamer as gs

SETS = (
    gs.Coupled(4, ("0",), ("1",), (), ("3",)),
    gs.Coupled(6, ("3",), ("4",), (), ("7",)),
)
X = torch.randn(32, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.1, -0.9, 0.8, 0.7]))
        model[4].weight.copy_(torch.tensor([0.2, 0.9, -0.3, 1.0, 1.1, 0.75]))
    return model


def step(model, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), X[:, 0].mean((1, 2)).gt(0).long()).backward()
    optimizer.step()


@pytest.mark.parametrize("targeted", [True, False])
def test_one_step_equals_the_formula(targeted):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = gs.weights.MaskSparsity(0.7, SETS, penalty=0.05, targeted=targeted)
    before = model[4].weight.detach().clone()
    nn.functional.cross_entropy(model(X), X[:, 0].mean((1, 2)).gt(0).long()).backward()
    gradient = model[4].weight.grad.clone()
    with gs.sparse_training(model, optimizer, method, total_steps=9) as run:
        assert list(run.masks) == ["1", "4"] and run.density == 1.0
        step(model, optimizer)
    marked = torch.tensor([1.0, 0, 1, 0, 0, 0]) if targeted else torch.ones(6)
    want = before - 0.5 * (gradient + 0.05 * before.sign() * marked)
    torch.testing.assert_close(model[4].weight.detach(), want)


def test_marked_scales_come_to_nothing_and_the_network_shrinks():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = gs.weights.MaskSparsity(0.7, SETS, penalty=0.2, until=0.9)
    with gs.sparse_training(model, optimizer, method, total_steps=100) as run:
        for _ in range(89):
            step(model, optimizer)
        marked = torch.cat([model[1].weight[:1], model[4].weight[[0, 2]]])
        assert run.density == 1.0 and marked.abs().max() < 0.02
        for _ in range(11):
            step(model, optimizer)
    assert run.density == 0.7
    assert model[1].weight[0] == 0 and not model[4].weight[[0, 2]].any()
    assert model[1].weight[1:].abs().min() > 0.3
    pytest.importorskip("torch_pruning")
    result = gs.remove_channels(model, X)
    assert result.removed == {"0": 1, "3": 2} and result.deviation < 1e-5


def test_by_threshold_the_density_is_what_comes_out_and_coupled_norms_go_together():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    method = gs.weights.MaskSparsity(0.7, SETS, until=0.1, threshold=0.5)
    with gs.sparse_training(model, optimizer, method, total_steps=10) as run:
        step(model, optimizer)
        assert [m.flatten().int().tolist() for m in run.masks.values()] == [
            [0, 1, 1, 1],
            [0, 1, 0, 1, 1, 1],
        ]
    both = (gs.Coupled(4, ("0",), ("1", "2"), (), ("3",)),)
    pair = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    pair[1].weight.data.copy_(torch.tensor([0.0, 0.5, 1.0, 0.1]))
    pair[2].weight.data.copy_(torch.tensor([1.0, 0.2, 0.3, 0.4]))
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    with gs.sparse_training(
        pair, optimizer, gs.weights.MaskSparsity(0.5, both), total_steps=4
    ) as run:
        chosen = run.state_dict()["state"]
    assert torch.equal(chosen["1:stays"], chosen["2:stays"])
    assert chosen["1:stays"].flatten().tolist() == [True, False, True, False]


def test_bad_input():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(gs.UsageError, match="no batch norm"),
        gs.sparse_training(model, optimizer, gs.weights.MaskSparsity(0.5, SETS), total_steps=2),
    ):
        pass
    normed = build()
    optimizer = torch.optim.SGD(normed.parameters(), lr=0.1)
    with (
        pytest.raises(gs.UsageError, match="exclude="),
        gs.sparse_training(
            normed, optimizer, gs.weights.MaskSparsity(0.5, SETS), total_steps=2, include=("1",)
        ),
    ):
        pass
    with pytest.raises(gs.UsageError, match="threshold"):
        gs.weights.MaskSparsity(0.5, SETS, threshold=0.0)
