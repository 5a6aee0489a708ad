"""SR-STE against the formulas, and what its decay is for."""

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.methods.weights.srste import sad


def train(method, steps=1, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    moved = 0.0
    with gs.sparse_training(model, optimizer, method, total_steps=steps) as run:
        for _ in range(steps):
            before = {k: v.clone() for k, v in run.masks.items()}
            x = torch.randn(32, 16, generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
            moved += sum(sad(before, run.masks).values())
        state = run.state_dict()
    return model, state, moved


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_one_step_equals_the_formula(decay):
    torch.manual_seed(0)
    weight = nn.Linear(16, 32).weight.detach().clone()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 16)
    method = gs.weights.SRSTE(gs.NM(1, 4), decay=decay)
    mask = torch.zeros(32, 4, 4).scatter(2, weight.reshape(32, 4, 4).abs().argmax(2, True), 1.0)
    mask = mask.reshape(32, 16)
    masked = (weight * mask).requires_grad_()
    bias = model[0].bias.detach().clone()
    (x @ masked.t() + bias).square().sum().backward()
    expected = weight - 0.1 * (masked.grad + decay * (1 - mask) * weight)
    with gs.sparse_training(model, optimizer, method, total_steps=1) as run:
        assert torch.equal(model[0].weight, weight * mask)
        model(x).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(run.state_dict()["hidden"]["0"], expected)


def test_decay_steadies_the_support():
    moved = [
        sum(train(gs.weights.SRSTE(gs.NM(1, 4), decay=d), 40, seed)[2] for seed in range(3))
        for d in (0.0, 0.02, 0.2)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_the_model_is_left_sparse_and_sad_counts_entries():
    model, _, _ = train(gs.weights.SRSTE(), 3)
    for layer in (model[0], model[2]):
        assert ((layer.weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    one = {"a": torch.tensor([[True, False, True, False]])}
    other = {"a": torch.tensor([[True, True, False, False]])}
    assert sad(one, other) == {"a": 0.5}
    with pytest.raises(gs.UsageError, match="decay"):
        gs.weights.SRSTE(decay=-1.0)
