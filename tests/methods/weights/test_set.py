"""SET's new weights: at zero, or drawn as the authors' sparse code draws them, in both runs."""

import pytest
import torch
from examples import step_of
from torch import nn

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.nn import SparseLinear

TOTAL = 10


def step_once(model, optimizer, inputs):
    optimizer.zero_grad()
    x = torch.randn(16, inputs, generator=torch.Generator().manual_seed(0))
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_new_weights_have_the_spread_and_fresh_state(spread):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    method = gs.weights.SET(0.2, gs.Uniform(), every=2, drop=0.4, spread=spread)
    with gs.sparse_training(model, optimizer, method, total_steps=TOTAL, include=("*",)) as run:
        step_once(model, optimizer, 200)
        old = {name: mask.clone() for name, mask in run.masks.items()}
        before = {x.name: x.weight.detach().clone() for x in run.layers}
        step_once(model, optimizer, 200)
        drawn = []
        for layer in run.layers:
            mask, weight = run.masks[layer.name], layer.weight.detach()
            new = mask & ~old[layer.name]
            drawn.append(weight[new])
            assert torch.equal(weight[mask & ~new], before[layer.name][mask & ~new])
            assert not weight[~mask].any()
            for key in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[layer.weight][key][new].any()
        values = torch.cat(drawn)
        assert run.changed == 2 * values.numel() > 8000
        assert abs(float(values.mean())) <= 4 * spread / values.numel() ** 0.5
        assert float(values.std()) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_same_where_only_kept_weights_exist(spread):
    layer = SparseLinear.random(200, 300, 0.2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0)
    method = gs.weights.SET(0.2, every=2, drop=0.4, spread=spread)
    with gs.true_sparse_training(layer, optimizer, method, total_steps=TOTAL) as run:
        step_once(layer, optimizer, 200)
        old, before = layer.positions, layer.to_matrix().flatten()
        step_once(layer, optimizer, 200)
        stayed = torch.isin(layer.positions, old)
        values = layer.values.detach()
        assert torch.equal(values[stayed], before[layer.positions[stayed]])
        assert run.changed == 2 * int((~stayed).sum()) > 8000
        assert float(values[~stayed].std()) == pytest.approx(spread, rel=0.05)
        state = optimizer.state[layer.values]
        assert not state["exp_avg"][~stayed].any() and state["exp_avg"][stayed].any()


def test_what_goes_and_comes_back_at_once_is_drawn_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = gs.weights.SET(0.95, every=1, drop=0.5, spread=9.0)
    with gs.sparse_training(model, optimizer, method, total_steps=3, include=("*",)) as run:
        before = run.masks["0"].clone()
        step_once(model, optimizer, 10)
        weight = model[0].weight.detach()
        back = before & run.masks["0"] & (weight.abs() > 1)  # a first weight is below 0.32
        assert int(back.sum()) > 20
        assert int((weight != 0).sum()) == 95


@pytest.mark.parametrize("method", [gs.weights.SET(0.3), gs.weights.RigL(0.3)])
def test_both_runs_drop_by_one_rule(method):
    """The dense update keeps what `survivors` says of the kept values, which is all that the
    compressed run asks."""
    generator = torch.Generator().manual_seed(0)
    masks = {"a": torch.rand(20, 30, generator=generator) < 0.3}
    weight = torch.randn(20, 30, generator=generator) * masks["a"]
    info = LayerInfo("a", (20, 30), None, weight)
    # growth is spread over what is outside, so what is dropped cannot come back
    gradients = {"a": (~masks["a"]).float() * torch.rand(20, 30, generator=generator)}
    step = step_of(100, 1000, [info], masks, gradients, generator)
    new = method.update(step)[-1]["a"]
    stay = method.survivors(weight[masks["a"]], 100, 1000)
    assert 0 < int(stay.sum()) < stay.numel()
    assert torch.equal(new[masks["a"]], stay) and int(new.sum()) == int(masks["a"].sum())


def test_the_spread_is_checked_and_zero_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert not gs.weights.SET(0.5).newcomers(7, generator).any()
    assert torch.equal(generator.get_state(), state)
    for bad in (-0.1, float("inf"), float("nan")):
        with pytest.raises(gs.UsageError, match="spread"):
            gs.weights.SET(0.5, spread=bad)
