"""Compression swaps what pays, says why not elsewhere, and changes no result."""

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.errors import UsageError
from gossamer.nn import BitmapLinear, NMLinear


def model(density=0.4):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64), nn.Conv2d(8, 8, 1), nn.Linear(64, 64)
    )
    with torch.no_grad():
        for layer in (net[0], net[2], net[3]):
            layer.weight[torch.rand_like(layer.weight) > density] = 0
    return net


def test_any_zeros_are_served_and_the_rest_says_why():
    net = model()
    x = torch.randn(4, 96)
    expected = net[2](net[1](net[0](x)))
    result = gs.compress(net)
    assert isinstance(net[0], BitmapLinear) and isinstance(net[2], BitmapLinear)
    torch.testing.assert_close(net[2](net[1](net[0](x))), expected, rtol=1e-5, atol=1e-5)
    records = {record.name: record for record in result.layers}
    assert records["0"].kernel.startswith("bitmap-matvec/")
    assert records["0"].sparse_bytes < records["0"].dense_bytes
    assert records["0"].density == int((net[0].to_matrix() != 0).sum()) / (96 * 128)
    assert "dense convolution is faster" in records["3"].reason
    assert records["4"].reason == "no zeros"
    assert gs.compress(net).layers[0].name == "3"  # idempotent: packed layers are left alone


def test_layers_that_would_not_gain_stay_dense():
    net = model(density=0.97)
    result = gs.compress(net)
    assert not any(isinstance(layer, BitmapLinear) for layer in net)
    assert "does not pay" in result.layers[0].reason
    with pytest.raises(gs.UsageError, match="stays dense"):
        gs.compress(model(density=0.97), strict=True)
    assert "above" in gs.compress(model(), max_density=0.1).layers[0].reason


def test_tied_weights_and_other_dtypes_stay_dense():
    net = model()
    net.append(nn.Linear(96, 128))
    net[5].weight = net[0].weight
    reasons = {record.name: record.reason for record in gs.compress(net).layers}
    assert "tied" in reasons["0"]
    assert "float64" in gs.compress(model().double()).layers[0].reason


def test_pruned_by_us():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    pruned = gs.prune(net, gs.weights.Magnitude(), density=0.5)
    result = gs.compress(pruned)
    assert [record.requested_density for record in result.layers] == [0.5, 0.5]
    assert all(record.pattern == "unstructured" for record in result.layers)
    assert all(record.density == 0.5 for record in result.layers)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [("1:4", NMLinear), ("2:8", NMLinear), ("1:16", NMLinear), ("4:8", BitmapLinear)],
)
def test_nm_patterns_take_the_smaller_form(pattern, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(640, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
    pruned = gs.prune(net, gs.weights.Magnitude(), pattern=gs.parse_pattern(pattern))
    x = torch.randn(3, 640)
    expected = net(x)
    result = gs.compress(pruned)
    assert isinstance(net[0], kind)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    stored = net[0].codes if kind is NMLinear else net[0].bitmap
    record = result.layers[0]
    assert record.sparse_bytes == net[0].values.nbytes + stored.nbytes
    assert record.kernel.startswith("nm-matvec/" if kind is NMLinear else "bitmap-matvec/")


def test_a_pattern_that_the_zeros_break_is_stored_as_a_bitmap():
    net = nn.Sequential(nn.Linear(64, 64))
    pruned = gs.prune(net, gs.weights.Magnitude(), pattern=gs.NM(1, 4))
    with torch.no_grad():
        net[0].weight[0, :4] = 1.0
    gs.compress(pruned)
    assert isinstance(net[0], BitmapLinear)


def test_a_refusal_changes_nothing():
    """strict is heard before the first layer is replaced, though only the last one cannot be."""
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 64), nn.Linear(64, 32))
    gs.prune(model, gs.weights.Magnitude(), density=0.3)
    model[2].double()
    with pytest.raises(UsageError, match="2 stays dense"):
        gs.compress(model, latency="rule", strict=True)
    assert [type(layer) for layer in model] == [nn.Linear] * 3
    with pytest.raises(UsageError, match="Sequential"):
        gs.compress(model[0], latency="rule")
    assert isinstance(gs.compress(model, latency="rule").model[0], BitmapLinear)


def test_every_matrix_has_one_record():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1), nn.Flatten(1), nn.Linear(16 * 36, 32),
        nn.LSTM(32, 16),
    ).eval()  # fmt: skip
    result = gs.compress(gs.prune(model, gs.weights.Magnitude(), density=0.3), latency="rule")
    names = [record.name for record in result.layers]
    assert sorted(names) == ["0", "1", "3", "4.weight_hh_l0", "4.weight_ih_l0"]
    reasons = {record.name: record.reason for record in result.layers}
    assert reasons["4.weight_ih_l0"] == "no kernel for weight_ih_l0 of LSTM"
