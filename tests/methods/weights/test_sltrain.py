"""SLTrain against the authors' own figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.nn.low_rank_sparse import LowRankSparseLinear

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/sltrain.json").read_text())["expected"]


def drawn(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def test_outputs_and_gradients_are_the_authors():
    support = torch.tensor(sorted(np.random.default_rng(660).permutation(120)[:12].tolist()))
    assert support.tolist() == GOLDEN["support"]["values"]
    layer = LowRankSparseLinear(
        0.3 * drawn(662, (10, 4)), 0.3 * drawn(661, (4, 12)), 0.3 * drawn(663, (12,)),
        support, 8 / 4, drawn(664, (10,)),
    )  # fmt: skip
    x = drawn(665, (2, 3, 12)).requires_grad_()
    y = layer(x)
    y.backward(drawn(666, (2, 3, 10)))
    found = {
        "output": y, "grad_x": x.grad, "grad_A": layer.down.grad, "grad_B": layer.up.grad,
        "grad_values": layer.values.grad, "grad_bias": layer.bias.grad,
    }  # fmt: skip
    for key, tensor in found.items():
        want = torch.tensor(GOLDEN[key]["values"])
        torch.testing.assert_close(tensor.detach(), want, rtol=1e-4, atol=1e-5)


def test_the_start_is_the_papers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300))
    gs.replace_layers(model, gs.weights.SLTrain(sparse=0.05, alpha=8), density=0.3)
    layer = model[0]
    assert layer.values.numel() == 3000 and layer.up.shape[1] == (18000 - 3000) // 500
    assert layer.scale == 8 / 30 and not layer.up.any()
    for drawn_values in (layer.down, layer.values):
        assert drawn_values.abs().max() <= 200**-0.5 + 1e-7
        assert float(drawn_values.detach().std()) == pytest.approx((3 * 200) ** -0.5, rel=0.05)
    assert (layer.support.diff() > 0).all() and int(layer.support.max()) < 60000
    weight = layer.fold().weight
    assert int((weight != 0).sum()) == 3000


def test_autocast_and_no_dense_weight_kept():
    layer = nn.Sequential(nn.Linear(64, 64))
    gs.replace_layers(layer, gs.weights.SLTrain(), density=0.3)
    x, kept = torch.randn(4, 64), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        layer(x)
    assert max(kept) < 64 * 64
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer[0].down.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.double())


def test_arguments_are_checked():
    for bad in ({"sparse": 0.0}, {"sparse": 1.0}, {"alpha": 0.0}):
        with pytest.raises(gs.UsageError, match="SLTrain"):
            gs.weights.SLTrain(**bad)
