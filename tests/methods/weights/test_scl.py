"""SCL against the formulas, and what its choices are for."""

import pytest
import torch
from torch import nn

import gossamer as gs


def train(method, steps, seed=0, lr=0.1):
    """(run, how often a weight that was off came back on)"""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    returns = 0
    with gs.sparse_training(model, optimizer, method, total_steps=steps) as run:
        for _ in range(steps):
            before = {k: v.clone() for k, v in run.masks.items()}
            x = torch.randn(32, 16, generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
            returns += sum(int((run.masks[k] & ~v).sum()) for k, v in before.items())
    return run, returns


@pytest.mark.parametrize("normalise", [True, False])
def test_steps_equal_the_formula(normalise):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    weight = model[0].weight.detach().clone()
    v = torch.full_like(weight, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    method = gs.weights.SCL(penalty=0.05, rate=1.5, slope=0.5, normalise=normalise)
    with gs.sparse_training(model, optimizer, method, total_steps=5) as run:
        for _ in range(5):
            x = torch.randn(16, 8)
            shown = (weight * (v > 0)).requires_grad_()
            (x @ shown.t() - x[:, :6]).square().mean().backward()
            pull = weight * shown.grad
            if normalise:
                pull = pull / pull.norm(dim=1, keepdim=True)
            weight = weight - 0.2 * shown.grad * (v > 0)
            v = v - 0.3 * torch.where(v > 0, 1.0, 0.5) * (pull + 0.05)
            optimizer.zero_grad()
            (model(x) - x[:, :6]).square().mean().backward()
            optimizer.step()
            state = run.state_dict()
            torch.testing.assert_close(state["state"]["0:v"], v)
            torch.testing.assert_close(state["hidden"]["0"], weight)
            torch.testing.assert_close(model[0].weight.detach(), weight * (v > 0))
    assert 0 < run.density < 1


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    ],
    ids=["sgd", "nesterov", "adamw"],
)
def test_what_is_off_keeps_its_value_bit_for_bit_and_comes_back_with_it(optimizer_of):
    torch.manual_seed(0)
    model = nn.Linear(12, 6)
    optimizer = optimizer_of(model.parameters())
    method = gs.weights.SCL(penalty=0.1, rate=0.5 if "SGD" in repr(optimizer) else 3.0)
    off = moved = returned = 0
    with gs.sparse_training(model, optimizer, method, total_steps=40, include=("",)) as run:
        for step in range(40):
            before, mask = run.state_dict()["hidden"][""], run.masks[""].clone()
            x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x[:, :6]).square().mean().backward()
            optimizer.step()
            after = run.state_dict()["hidden"][""]
            assert torch.equal(after[~mask], before[~mask])
            back = run.masks[""] & ~mask
            assert torch.equal(model.weight.detach()[back], before[back])
            off += int((~mask).sum())
            moved += int((after[mask] != before[mask]).sum())
            returned += int(back.sum())
    assert off > 0 and moved > 0 and returned > 0


def test_supports_come_to_rest_as_the_learning_rate_does():
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.sparse_training(
        model, optimizer, gs.weights.SCL(penalty=0.3), total_steps=30, include=("",)
    ) as run:
        before = run.state_dict()["state"][":v"]
        for rate in (0.1, 0.05, 0.0):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            pull = run.state_dict()["hidden"][""] * model.weight.grad
            pull = pull / pull.norm(dim=1, keepdim=True)
            optimizer.step()
            after = run.state_dict()["state"][":v"]
            torch.testing.assert_close(after, before - rate * (pull + 0.3))
            before = after


def test_a_higher_price_leaves_fewer_connections_and_layers_differ():
    runs = [train(gs.weights.SCL(penalty=p), 60)[0] for p in (0.01, 0.05, 0.2)]
    found = [run.density for run in runs]
    assert found[0] > found[1] > found[2]
    shares = [float(mask.double().mean()) for mask in runs[1].masks.values()]
    assert abs(shares[0] - shares[1]) > 0.02


def test_a_rectified_estimator_strands_what_is_off():
    assert train(gs.weights.SCL(penalty=0.05, slope=1.0), 60)[1] > 0
    assert train(gs.weights.SCL(penalty=0.05, slope=0.0), 60)[1] == 0


def test_a_layer_never_empties_and_bad_arguments_are_refused():
    run, _ = train(gs.weights.SCL(penalty=10.0), 3)
    assert all(int(mask.sum()) == 1 for mask in run.masks.values())
    for bad in ({"penalty": -1.0}, {"rate": 0.0}, {"slope": 2.0}, {"initial": 0.0}):
        with pytest.raises(gs.UsageError):
            gs.weights.SCL(**bad)


def test_a_state_without_the_variables_is_refused():
    run, _ = train(gs.weights.SCL(), 2)
    state = run.state_dict()
    state["state"].popitem()
    with pytest.raises(gs.FormatError, match="state are not"):
        run.load_state_dict(state)
