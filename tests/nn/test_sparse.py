"""Layers that hold only kept weights: what they compute, how they rewire, how they are stored."""

import copy

import pytest
import torch
from torch import nn

from gossamer.core.errors import UsageError
from gossamer.nn import SparseConv2d, SparseLinear, to_dense
from gossamer.nn.sparse import carry, random_positions


def linear(out=20, width=30, density=0.3, seed=0):
    return SparseLinear.random(width, out, density, generator=torch.Generator().manual_seed(seed))


def test_random_layers_have_exact_counts_and_the_spread_of_dense_ones():
    layer = linear(200, 300, 0.1)
    assert layer.values.numel() == 6000 and layer.density == 0.1
    bound = 300**-0.5
    assert 0.9 * bound < float(layer.values.detach().abs().max()) <= bound
    assert 0.9 * bound < float(layer.bias.detach().abs().max()) <= bound
    assert torch.equal(layer.positions, linear(200, 300, 0.1).positions)
    assert not torch.equal(layer.positions, linear(200, 300, 0.1, seed=1).positions)
    assert SparseLinear.random(3, 4, 0.5, bias=False).bias is None


def test_there_is_no_dense_tensor():
    layer = linear(200, 300, 0.05)
    parts = [*layer.parameters(), *layer.buffers()]
    assert max(part.numel() for part in parts) < 200 * 300 / 10
    assert [p.shape for p in layer.parameters()] == [(3000,), (200,)]


def test_a_linear_layer_goes_in_and_comes_out():
    dense = nn.Linear(30, 20)
    with torch.no_grad():
        dense.weight[torch.rand(20, 30) < 0.7] = 0
    layer = SparseLinear.from_linear(dense)
    x = torch.randn(5, 6, 30)
    torch.testing.assert_close(layer(x), dense(x))
    model = to_dense(nn.Sequential(layer, nn.ReLU()))
    assert torch.equal(model[0].weight, dense.weight) and torch.equal(model[0].bias, dense.bias)
    assert model[0].weight.requires_grad and isinstance(to_dense(layer), nn.Linear)
    assert (layer.in_features, layer.out_features) == (30, 20) and "density=0." in repr(layer)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_equals_its_dense_form_with_gradients(stride):
    dense = nn.Conv2d(12, 8, 1, stride=stride)
    with torch.no_grad():
        dense.weight[torch.rand(8, 12, 1, 1) < 0.6] = 0
    layer = SparseConv2d.from_conv(dense)
    x = torch.randn(3, 12, 7, 5, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x[0]))
    weights = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad((dense(x) * weights).sum(), x)
    torch.testing.assert_close(grad, wanted)
    (y * weights).sum().backward()
    (dense(x) * weights).sum().backward()
    wanted = dense.weight.grad.reshape(-1)[layer.positions]
    torch.testing.assert_close(layer.values.grad, wanted, rtol=1e-4, atol=1e-5)
    rows, grads = layer.as_rows(x.detach(), weights)
    torch.testing.assert_close(grads.t() @ rows, dense.weight.grad.flatten(1), rtol=1e-4, atol=1e-4)
    back = layer.to_dense()
    assert torch.equal(back.weight, dense.weight) and back.stride == dense.stride
    assert SparseConv2d.random(12, 8, 0.25, stride).values.numel() == 24


def test_rewiring_carries_survivors_and_starts_others_at_zero():
    layer = linear()
    before, positions = layer.to_matrix().reshape(-1), layer.positions
    value, parameter = layer.values.detach().clone(), layer.values
    new = random_positions(180, 600, torch.Generator().manual_seed(5))
    origin = layer.rewire(new)
    assert layer.values is parameter and torch.equal(layer.positions, new)
    was = torch.isin(new, positions)
    assert torch.equal(origin >= 0, was) and 0 < int(was.sum()) < 180
    assert torch.equal(layer.to_matrix().reshape(-1)[new], before[new])
    assert torch.equal(carry(value, origin), layer.values)
    x = torch.randn(4, 30)
    torch.testing.assert_close(layer(x), x @ layer.to_matrix().t() + layer.bias)
    layer.rewire(new, carried=torch.zeros(180, dtype=torch.bool))
    assert not layer.values.any()
    layer.rewire(new[:7])
    assert layer.values.shape == (7,)
    with pytest.raises(UsageError, match="ascend"):
        layer.rewire(new.flip(0))
    assert torch.equal(layer.positions, new[:7])


def test_state_dicts_bring_their_topology_along():
    ours, other = linear(), linear(density=0.1, seed=1)
    x = torch.randn(4, 30)
    assert set(ours.state_dict()) == {"values", "bias", "columns", "row_ptr"}
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(x), ours(x)) and torch.equal(other.positions, ours.positions)
    other(x).sum().backward()
    optimizer.step()
    assert not torch.equal(other.values, ours.values)
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("columns", lambda t: t + 30, "outside"),
        ("columns", lambda t: t.flip(0), "ascend"),
        ("columns", lambda t: t.long(), "int32"),
        ("row_ptr", lambda t: t + 1, "rows"),
        ("row_ptr", lambda t: t[1:], "rows"),
        ("row_ptr", lambda t: torch.cat([t[:1], torch.tensor([2**63 - 1, -2]), t[3:]]), "rows"),
        ("values", lambda t: t[1:], "values for"),
    ],
)
def test_a_wrong_state_changes_nothing(part, change, words):
    layer = linear()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(4, 30)
    before = layer(x)
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict({**state, part: change(state[part])})
    assert torch.equal(layer(x), before)


def test_random_positions_are_fair_and_avoid_what_is_taken():
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(20)
    taken = torch.tensor([3, 7, 19])
    for _ in range(2000):
        drawn = random_positions(5, 20, generator, taken)
        assert drawn.numel() == 5 and bool((drawn.diff() > 0).all())
        seen[drawn] += 1
    assert not seen[taken].any()
    free = seen[torch.isin(torch.arange(20), taken, invert=True)]
    assert float((free - 2000 * 5 / 17).abs().max()) < 120  # over five standard deviations
    assert torch.equal(random_positions(17, 20, generator, taken), (seen > 0).nonzero().reshape(-1))
    with pytest.raises(UsageError, match="17 of 20"):
        random_positions(18, 20, generator, taken)


def test_compiles():
    layer, x = linear(), torch.randn(4, 30, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    grad, layer.values.grad = layer.values.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(grad, layer.values.grad)


def test_bad_input():
    with pytest.raises(UsageError, match="density"):
        SparseLinear.random(3, 4, 1.5)
    with pytest.raises(UsageError, match="no weight"):
        SparseLinear.random(3, 4, 0.01)
    with pytest.raises(UsageError, match="inputs and outputs"):
        SparseLinear.random(0, 4, 0.5)
    with pytest.raises(UsageError, match="width 30"):
        linear()(torch.randn(4, 20))
    with pytest.raises(UsageError, match="1x1"):
        SparseConv2d.from_conv(nn.Conv2d(4, 4, 3))
    with pytest.raises(UsageError, match="channels"):
        SparseConv2d.random(4, 4, 0.5)(torch.randn(2, 3, 5, 5))
    with pytest.raises(UsageError, match="bias"):
        SparseLinear(torch.tensor([0]), torch.ones(1), (2, 2), torch.ones(3))
    with pytest.raises(UsageError, match="values for"):
        SparseLinear(torch.tensor([0]), torch.ones(2), (2, 2), None)
