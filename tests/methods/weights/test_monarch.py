"""Monarch against the authors' own figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.nn.monarch import MonarchLinear, monarch_multiply, monarch_project

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/monarch.json").read_text())["expected"]


def drawn(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def projected(weight, blocks_in, blocks_out, rank=1):
    first, second = monarch_project(weight, blocks_in, blocks_out, rank)
    eye = torch.eye(weight.shape[1])
    return first, second, monarch_multiply(eye, first, second).t()


@pytest.mark.parametrize(
    ("name", "seed", "side", "blocks"),
    [
        ("n16", 650, 16, (4, 4)),
        ("n12_default_sizes", 652, 12, (4, 3)),
        ("n12_sizes_3_4", 652, 12, (3, 4)),
    ],
)
def test_projections_are_the_authors(name, seed, side, blocks):
    weight = drawn(seed, (side, side))
    first, second, dense = projected(weight, *blocks)
    error = float((dense - weight).square().sum())
    assert error == pytest.approx(GOLDEN[f"{name}_squared_error"], rel=1e-4)
    row = GOLDEN.get(f"{name}_projection_row0") or GOLDEN["n12_projection_row0"]
    torch.testing.assert_close(dense[0], torch.tensor(row["values"]), rtol=1e-3, atol=1e-4)
    if name == "n16":
        shapes = [x["values"] for x in GOLDEN["n16_factor_shapes"]]
        assert [list(first.shape), list(second.shape)] == shapes
        want = torch.tensor(GOLDEN["n16_apply_projection_to_x"]["values"])
        applied = monarch_multiply(drawn(651, (2, 16)), first, second)
        torch.testing.assert_close(applied, want, rtol=1e-3, atol=1e-4)


def test_ranks_above_one_and_exact_cases_are_the_authors():
    weight = drawn(657, (16, 16))
    error = float((projected(weight, 2, 2, 4)[2] - weight).square().sum())
    assert error == pytest.approx(GOLDEN["n16_nblocks2_rank4_squared_error"], rel=1e-4)
    hadamard = torch.ones(1, 1)
    for _ in range(4):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    assert float((projected(hadamard / 4, 4, 4)[2] - hadamard / 4).square().sum()) < 1e-10


def test_the_rectangular_product_and_its_gradients_are_the_authors():
    first, second = drawn(653, (4, 5, 3)), drawn(654, (4, 6, 5))
    layer, x = MonarchLinear(12, 24, first, second), drawn(655, (3, 12)).requires_grad_()
    y = layer(x)
    y.backward(drawn(656, (3, 24)))
    for key, tensor in {
        "rect_in12_out24_output": y, "rect_dx": x.grad,
        "rect_dw1": layer.first.grad, "rect_dw2": layer.second.grad,
    }.items():  # fmt: skip
        want = torch.tensor(GOLDEN[key]["values"])
        torch.testing.assert_close(tensor.detach(), want, rtol=1e-3, atol=1e-3)


def test_the_density_decides_the_rank_and_full_rank_is_exact():
    model = nn.Sequential(nn.Linear(30, 22))
    old = model[0].weight.detach().clone()
    result = gs.replace_layers(model, gs.weights.Monarch(blocks=2), density=1.0)
    assert model[0].second.shape == (2, 11, 2 * ((30 * 22) // (4 * 26)))
    assert result.errors["0"] > 0 and result.measured_density <= 1
    dense = projected(old[:20], 2, 2, 10)[2]
    torch.testing.assert_close(dense, old[:20])


def test_arguments_are_checked():
    for bad in ({"blocks": 0}, {"blocks": 1.5}, {"start": "zero"}):
        with pytest.raises(gs.UsageError, match="Monarch"):
            gs.weights.Monarch(**bad)
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(gs.NonFiniteError, match="0"):
        gs.replace_layers(model, gs.weights.Monarch(2), density=1.0)
