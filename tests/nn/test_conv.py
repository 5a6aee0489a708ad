"""The sparse 1x1 convolution as a layer: compress puts it there, folders keep it."""

import pytest
import torch
from torch import nn

from gossamer.core.errors import FormatError, UsageError
from gossamer.engine.compress import compress
from gossamer.io.export import _dense_state
from gossamer.io.load import load
from gossamer.io.save import save
from gossamer.nn import BitmapLinear, PointwiseConv2d
from gossamer.nn.conv import MAX_DENSITY


def model(density=0.1, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 40, 1),
        nn.Conv2d(40, 24, 1, stride=(2, 3), bias=False),
        nn.Conv2d(24, 24, 3, 1, 1, groups=24),
    )
    for conv in (net[2], net[3]):
        conv.weight.data[torch.rand_like(conv.weight) > density] = 0
    return net.to(dtype).eval()


def test_compress_replaces_pointwise_convolutions_and_says_why_not_others():
    net, x = model(), torch.randn(2, 3, 21, 19)
    expected = net(x)
    net[0].weight.data[0, 0] = 0
    expected = net(x)
    result = compress(net)
    assert isinstance(net[2], PointwiseConv2d) and isinstance(net[3], PointwiseConv2d)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert "3x3 convolution stays dense" in reasons["0"]
    assert not reasons["2"] and "4" not in reasons  # depthwise layers are not looked at
    assert all("pointwise-conv" in r.kernel for r in result.layers if r.name in "23")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n[2].weight.data.normal_(), "no zeros"),
        (lambda n: n[2].weight.data[:, ::2].normal_(), f"at most {MAX_DENSITY}"),
        (lambda n: n.bfloat16(), "bfloat16"),
        (lambda n: n.double(), "no kernel for torch.float64"),
        (lambda n: setattr(n[2], "padding", (1, 1)), "padded"),
    ],
)
def test_refusals(change, words):
    net = model()
    change(net)
    reasons = {layer.name: layer.reason for layer in compress(net).layers}
    assert words in reasons["2"] and isinstance(net[2], nn.Conv2d)


def test_round_trip(tmp_path):
    net, x = model(), torch.randn(1, 3, 18, 18)
    compress(net)
    save(net, tmp_path / "net")
    back = load(tmp_path / "net", model=model(1.0))
    assert isinstance(back[2], PointwiseConv2d) and back[3].stride == (2, 3)
    with torch.inference_mode():
        assert torch.equal(back(x), net(x))
    dense = model(1.0)
    dense.load_state_dict(_dense_state(net, dense))
    with torch.inference_mode():
        torch.testing.assert_close(dense(x), net(x), rtol=1e-4, atol=1e-5)
    other = model()
    other[2] = nn.Conv2d(16, 40, 1, padding=1)
    with pytest.raises(FormatError, match="no linear layer of that shape"):
        load(tmp_path / "net", model=other)
    assert isinstance(other[3], nn.Conv2d)


def test_new_values_and_bad_input():
    weight = torch.randn(6, 5) * (torch.rand(6, 5) < 0.5)
    layer = PointwiseConv2d(BitmapLinear.from_matrix(weight, torch.randn(6)), (1, 1))
    x = torch.randn(1, 5, 4, 4)
    first = layer(x)
    assert torch.equal(layer.to_matrix(), weight) and "density" in repr(layer)
    with torch.no_grad():
        layer.values.mul_(2)
    bias = layer.bias.reshape(-1, 1, 1)
    torch.testing.assert_close(layer(x) - bias, 2 * (first - bias), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="5 channels"):
        layer(torch.randn(1, 6, 4, 4))
    with pytest.raises(UsageError, match="stride"):
        PointwiseConv2d(BitmapLinear.from_matrix(weight), (0, 1))
