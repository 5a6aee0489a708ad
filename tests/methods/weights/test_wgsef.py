"""WGSEF: the proximal step against a numerical optimum, and what the trainer does with it."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import gossamer as gs
from gossamer.methods.weights.wgsef import envelope_scale, within_cost


def numerical_prox(target, costs, budget, strength):
    """argmin over v and u together, by a general solver that knows nothing of the closed form."""
    groups, wide = target.shape

    def parts(z):
        return z[: groups * wide].reshape(groups, wide), z[groups * wide :]

    def objective(z):
        v, u = parts(z)
        ratio = (v**2).sum(1) / u
        grad_v = strength * v / u[:, None] + v - target
        grad_u = -0.5 * strength * ratio / u
        value = 0.5 * strength * ratio.sum() + 0.5 * ((v - target) ** 2).sum()
        return value, np.concatenate([grad_v.ravel(), grad_u])

    start = np.concatenate([target.ravel(), np.full(groups, min(1.0, budget / costs.sum()))])
    room = {
        "type": "ineq",
        "fun": lambda z: budget - costs @ parts(z)[1],
        "jac": lambda z: np.concatenate([np.zeros(groups * wide), -costs]),
    }
    bounds = [(None, None)] * (groups * wide) + [(1e-7, 1.0)] * groups
    options = {"maxiter": 500, "ftol": 1e-14}
    found = minimize(objective, start, jac=True, bounds=bounds, constraints=[room], options=options)
    return parts(found.x)[0], found.fun


def closed_form(target, costs, budget, strength):
    norms = torch.tensor(np.linalg.norm(target, axis=1))
    return target * envelope_scale(norms, torch.tensor(costs), budget, strength).numpy()[:, None]


@pytest.mark.parametrize("strength", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_step_is_the_optimum(seed, weighted, strength):
    draw = np.random.default_rng(seed)
    target = draw.normal(size=(6, 3)) * draw.uniform(0.2, 2.0, size=(6, 1))
    costs = draw.uniform(0.5, 3.0, size=6) if weighted else np.ones(6)
    budget = 0.4 * costs.sum() if weighted else 2.0
    mine = closed_form(target, costs, budget, strength)
    theirs, value = numerical_prox(target, costs, budget, strength)
    np.testing.assert_allclose(mine, theirs, atol=2e-3)
    norms = np.linalg.norm(target, axis=1)
    scale = np.linalg.norm(mine, axis=1) / norms
    u = strength * scale / (1 - scale)
    assert costs @ u == pytest.approx(budget) and (u <= 1 + 1e-9).all()
    held = u > 0
    ours = 0.5 * strength * ((mine[held] ** 2).sum(1) / u[held]).sum()
    assert ours + 0.5 * ((mine - target) ** 2).sum() <= value + 1e-6


def test_limits_of_the_step():
    norms = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    hard = envelope_scale(norms, ones, 2.0, 5.0)
    torch.testing.assert_close(hard, torch.tensor([1.0, 1, 0, 0]).double() / 6)
    soft = envelope_scale(norms, ones, 2.0, 1e-9)
    assert (soft[:3] > 1 - 1e-6).all() and soft[3] == 0
    enough = envelope_scale(norms, ones, 3.0, 1.0)
    torch.testing.assert_close(enough, torch.tensor([0.5, 0.5, 0.5, 0]).double())
    gap = envelope_scale(norms, ones, 2.0, 0.9)
    assert gap[2] > 0, "the gap is 1 / (2 - 1): a smaller strength leaves the third alive"
    assert envelope_scale(norms, ones, 2.0, 1.1)[2] == 0
    equal = envelope_scale(torch.ones(4).double(), ones, 2.0, 1.0)
    torch.testing.assert_close(equal, torch.full((4,), 1 / 3).double())


def test_a_step_of_training_is_sgd_and_then_the_prox_of_coupled_rows():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "c": nn.Linear(6, 2)})
    sets = (gs.Coupled(6, ("a", "b"), (), (), ("c",)),)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 4)

    def loss(a, b, c):
        return (c(torch.relu(a(x)) + torch.relu(b(x)))).square().mean()

    loss(*model.values()).backward()
    want = {name: m.weight.detach() - 0.1 * m.weight.grad for name, m in model.items()}
    method = gs.weights.WGSEF(0.5, sets, strength=3.0, until=0.75)
    with gs.sparse_training(model, optimizer, method, total_steps=8, include=("*",)) as run:
        optimizer.step()
        norms = torch.cat([want["a"], want["b"]], 1).double().norm(dim=1)
        scale = envelope_scale(norms, torch.ones(6).double(), 3.0, 0.3).float().unsqueeze(1)
        torch.testing.assert_close(model["a"].weight.detach(), want["a"] * scale)
        torch.testing.assert_close(model["b"].weight.detach(), want["b"] * scale)
        torch.testing.assert_close(model["c"].weight.detach(), want["c"])
        for _ in range(7):
            optimizer.zero_grad()
            loss(*model.values()).backward()
            optimizer.step()
    kept = run.masks["a"].any(1)
    assert int(kept.sum()) == 3 and torch.equal(run.masks["a"], run.masks["b"])
    assert run.masks["c"].all() and not model["a"].weight[~kept].any()


def three_sets():
    """Sets of 5, 4 and 6 channels whose groups cost 4, 5 + 5 and 4."""
    torch.manual_seed(1)
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 5), "b": nn.Linear(5, 4), "c": nn.Linear(5, 4), "d": nn.Linear(4, 6)}
    )
    sets = (
        gs.Coupled(5, ("a",), (), (), ("b", "c")),
        gs.Coupled(4, ("b", "c"), (), (), ("d",)),
        gs.Coupled(6, ("d",), (), (), ()),
    )
    x = torch.randn(16, 4)

    def loss():
        hidden = torch.relu(model["a"](x))
        return model["d"](model["b"](hidden) + model["c"](hidden)).square().mean()

    return model, sets, loss


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("density", [0.15, 0.4, 0.73])
def test_a_weighted_cut_goes_by_cost(density, pooled):
    model, sets, loss = three_sets()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = gs.weights.WGSEF(density, sets, strength=0.2, pooled=pooled, weighted=True)
    with gs.sparse_training(model, optimizer, method, total_steps=4, include=("*",)) as run:
        for _ in range(4):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    cost = {"a": 4, "b": 10, "d": 4}
    held = {name: run.masks[name].any(1) for name in cost}
    assert torch.equal(run.masks["b"], run.masks["c"])
    spent = {name: cost[name] * int(kept.sum()) for name, kept in held.items()}
    whole = {name: cost[name] * len(kept) for name, kept in held.items()}
    if pooled:
        must = sum(cost.values())
        assert sum(spent.values()) <= max(must, density * sum(whole.values()) + 1e-9)
    else:
        for name in cost:
            assert spent[name] <= max(cost[name], density * whole[name] + 1e-9)
            assert spent[name] + cost[name] > density * whole[name]


@pytest.mark.parametrize("seed", range(5))
def test_what_stays_within_a_cost_is_the_longest_prefix_by_rank(seed):
    draw = np.random.default_rng(seed)
    ranks = [torch.tensor(draw.random(n)) for n in (5, 3, 7)]
    costs = [torch.full((n,), float(c)) for n, c in ((5, 9), (3, 2), (7, 4))]
    budget = float(draw.uniform(16, 79))
    kept = within_cost(ranks, costs, budget)
    rows = [(float(r[i]), float(c[i]), s, i) for s, (r, c) in enumerate(zip(ranks, costs, strict=True))
            for i in range(len(r))]  # fmt: skip
    best = {max(row for row in rows if row[2] == s) for s in range(3)}
    order = sorted(best, reverse=True) + sorted(set(rows) - best, reverse=True)
    want, spent = set(best), sum(row[1] for row in best)
    for row in order[3:]:
        if spent + row[1] > budget:
            break
        want.add(row)
        spent += row[1]
    assert {(s, i) for s, mask in enumerate(kept) for i in mask.nonzero().flatten().tolist()} == {
        row[2:] for row in want
    }
    assert spent <= budget


def test_the_strength_is_that_times_the_learning_rate():
    model, sets, loss = three_sets()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = gs.weights.WGSEF(0.5, sets, strength=2.0)
    with gs.sparse_training(model, optimizer, method, total_steps=8, include=("*",)):
        for rate in (0.1, 0.03, 0.0):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss().backward()
            want = (model["a"].weight - rate * model["a"].weight.grad).detach()
            optimizer.step()
            if rate:
                norms = want.double().norm(dim=1)
                scale = envelope_scale(norms, torch.ones(5).double(), 3.0, 2.0 * rate)
                want = want * scale.float().unsqueeze(1)
            torch.testing.assert_close(model["a"].weight.detach(), want)


def test_layers_that_share_a_budget_need_one_learning_rate():
    model, sets, _ = three_sets()
    slow = [*model["c"].parameters()]
    rest = [p for name in "abd" for p in model[name].parameters()]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": slow, "lr": 0.01}], lr=0.1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for pooled, says in ((False, "c: its learning rate 0.01 is not that of b"), (True, "of a")):
        run = gs.SparseRun(model, optimizer, gs.weights.WGSEF(0.5, sets, pooled=pooled), 4, ("*",))
        with pytest.raises(gs.UsageError, match=says):
            run.start()
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())


def test_a_layer_outside_the_run_and_bad_arguments_are_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    sets = (gs.Coupled(6, ("0",), (), (), ("2",)),)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(gs.UsageError, match="not in training"),
        gs.sparse_training(
            model, optimizer, gs.weights.WGSEF(0.5, sets), total_steps=2, exclude=("0",)
        ),
    ):
        pass
    for bad in (
        lambda: gs.weights.WGSEF(0.0, sets),
        lambda: gs.weights.WGSEF(0.5, ["0"]),
        lambda: gs.weights.WGSEF(0.5, sets, strength=0.0),
    ):
        with pytest.raises(gs.UsageError):
            bad()
