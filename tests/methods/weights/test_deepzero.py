"""DeepZero's estimates against the released code's, and against what finite differences must be."""

import golden
import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.methods import build
from gossamer.methods.weights.topology import layer_counts

RECORD = golden.load("deepzero_cge")


def network():
    """The record's network in float64, with its batch and its masks of the two weights."""
    drawn = {name: golden.draw(RECORD["inputs"], name) for name in ("W1", "b1", "W2", "b2", "X")}
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for layer, weight, bias in ((model[0], "W1", "b1"), (model[2], "W2", "b2")):
        layer.weight.data.copy_(drawn[weight])
        layer.bias.data.copy_(drawn[bias])
    x, y = drawn["X"].double(), torch.tensor(RECORD["inputs"]["y"]["values"])
    masks = {"0.weight": golden.draw(RECORD["inputs"], "u1") < 0.3}
    masks["2.weight"] = golden.draw(RECORD["inputs"], "u2") < 0.5
    assert all(golden.is_mask(masks[f"{i}.weight"], RECORD["inputs"][f"mask{k}"])
               for i, k in ((0, 1), (2, 2)))  # fmt: skip
    return model, lambda: float(nn.functional.cross_entropy(model(x), y)), masks


@pytest.mark.parametrize("case", RECORD["cases"], ids=lambda c: f"{c['case'][:6]}-{c['mu']}")
@torch.no_grad()
def test_coordinate_wise_estimates_are_those_of_the_release(case):
    model, loss, masks = network()
    parameters = dict(model.named_parameters())
    chosen = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    if "queries" in case:
        chosen |= masks
    source = gs.weights.DeepZero(mu=case["mu"])
    found = source.estimate(loss, parameters, chosen, torch.Generator())
    for name, want in case["grad"].items():
        golden.close(found[name], want)
    if "queries" in case:
        assert source.queries(chosen) == case["queries"]  # the base loss and 26 coordinates
    else:
        assert loss() == pytest.approx(case["loss"], rel=1e-8)


def test_the_mean_over_random_directions_tends_to_the_gradient():
    """Standard normal directions are unbiased: at 20000 of them the estimate is near, in length
    too, which tells it from the released scaling."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, dtype=torch.float64)

    def loss():
        return ((weight - target) ** 2).sum() + weight.sin().sum()

    loss().backward()
    mask = torch.rand(4, 3) < 0.6
    source = gs.weights.DeepZero(mu=1e-4, estimator="random", directions=20000)
    with torch.no_grad():
        found = source.estimate(
            lambda: float(loss()), {"w": weight}, {"w": mask}, torch.Generator().manual_seed(0)
        )["w"]
    true = weight.grad * mask
    assert float((found - true).norm() / true.norm()) < 0.05


def test_masks_have_the_allocation_s_exact_counts_and_leave_vectors_whole():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8))
    parameters = dict(model.named_parameters())
    source = gs.weights.DeepZero(0.25, allocation=gs.Uniform())
    chosen = source.coordinates(parameters, torch.Generator().manual_seed(0))
    assert chosen["0.weight"].shape == (4, 3, 3, 3) and int(chosen["0.weight"].sum()) == 27
    assert int(chosen["3.weight"].sum()) == 32
    assert all(bool(m.all()) for name, m in chosen.items() if parameters[name].dim() == 1)
    infos = [
        LayerInfo(n, tuple(p.shape), None, p.detach().flatten(1))
        for n, p in parameters.items()
        if p.dim() > 1
    ]
    counts = layer_counts(infos, gs.ERK(), 0.25)
    erk = gs.weights.DeepZero(0.25).coordinates(parameters, torch.Generator())
    assert {n: int(erk[n].sum()) for n in counts} == counts


def test_a_choice_holds_for_its_period_and_the_next_is_another():
    model = nn.Linear(20, 20)
    x = torch.randn(8, 20)
    estimates = gs.EstimatedGradients(model, gs.weights.DeepZero(0.1, period=0.25), 12)
    seen = []
    for _ in range(12):
        estimates.backward(lambda: model(x).square().mean())
        seen.append(estimates.coordinates["weight"])
    for step in range(1, 12):
        assert torch.equal(seen[step], seen[step - 1]) == (step % 3 != 0)
    assert len({tuple(m.flatten().tolist()) for m in seen}) == 4


def test_options_are_checked_and_named_in_words():
    assert build("deepzero:active=0.2,estimator=random") == gs.weights.DeepZero(
        0.2, estimator="random"
    )
    for bad in (
        {"active": 0.0},
        {"mu": 0.0},
        {"mu": float("nan")},
        {"period": 2.0},
        {"directions": 0},
        {"estimator": "central"},
    ):
        with pytest.raises(gs.UsageError):
            gs.weights.DeepZero(**bad)
