"""MdGf against the authors' own figures and a loop by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.methods.weights.mdgf import DecayingMask

CASES = json.loads((Path(__file__).parents[2] / "golden/pgf_mdgf_sdgf.json").read_text())["cases"]


def drawn(seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((8, 32)).astype("float32"))


def test_decay_is_the_authors():
    (rows,) = (case["rows"] for case in CASES if case["case"].startswith("decay value"))
    for coefficient, t, linear, exponential in rows:
        for decay, want in (("linear", linear), ("exponential", exponential)):
            method = gs.weights.MdGf(decay=decay, begin=0, end=1, coefficient=coefficient)
            assert method.beta(t, 10**6) == pytest.approx(want, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("decay", ["linear", "exponential"])
def test_effective_weight_and_gradient_are_the_authors(decay):
    (case,) = (x for x in CASES if x["case"] == f"MdGf {decay}, N:M = 1:8")
    method = gs.weights.MdGf(
        gs.NM(1, 8), decay, "straight", 0.0, 1.0, coefficient=case["coefficient"]
    )
    weight, upstream = drawn(41).requires_grad_(), drawn(42)
    mask = DecayingMask(method, LayerInfo("w", (8, 32), None, weight.detach()))
    mask.beta.fill_(method.beta(case["t"], 10**6))
    effective, want = mask(weight), case["effective_weight"]
    assert float(effective.detach().sum()) == pytest.approx(want["sum"], rel=1e-4)
    assert float(effective.detach().norm()) == pytest.approx(want["l2"], rel=1e-4)
    assert effective.flatten()[:12].tolist() == pytest.approx(want["first12"], rel=1e-4)
    effective.backward(upstream)
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("gradient", ["masked", "straight"])
def test_equals_a_loop_by_hand(gradient):
    torch.manual_seed(0)
    layer = nn.Linear(16, 3, bias=False).double()
    weight = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = gs.weights.MdGf(gs.NM(1, 4), gradient=gradient, begin=0.1, end=0.6)
    betas = [1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0]
    with gs.sparse_training(layer, optimizer, method, total_steps=20, include=("",)) as run:
        for step, beta in enumerate(betas):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).double()
            best = weight.reshape(3, 4, 4).abs().argmax(2, keepdim=True)
            kept = torch.zeros(3, 4, 4, dtype=torch.double).scatter(2, best, 1.0).reshape(3, 16)
            factor = kept + beta * (1 - kept)
            product = x @ (weight * factor).t()
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
            change = 2 * product.t() @ x
            weight = weight - 0.1 * change * (factor if gradient == "masked" else 1)
            torch.testing.assert_close(run.layers[0].weight.detach(), weight, rtol=1e-4, atol=1e-5)
        assert run.gap == 0, "the mask is hard at the end"
    torch.testing.assert_close(layer.weight.detach() != 0, run.supports[""].mask)


def test_arguments_are_checked():
    for bad in ({"begin": 0.9}, {"decay": "fast"}, {"gradient": "none"}, {"coefficient": 0.0}):
        with pytest.raises(gs.UsageError, match="MdGf"):
            gs.weights.MdGf(**bad)
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(gs.PatternError, match="0"),
        gs.sparse_training(model, optimizer, gs.weights.MdGf(), total_steps=3),
    ):
        pass
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
