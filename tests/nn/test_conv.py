"""Packed convolutions as layers: compress puts them there, folders keep them, chains run them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.matrix import as_matrix
from gossamer.engine.serve.compress import compress
from gossamer.engine.serve.unpack import unpack
from gossamer.io.load import load
from gossamer.io.save import save
from gossamer.nn import BitmapLinear, ConvChain, DepthwiseConv2d, PackedConv2d
from gossamer.nn.packed.conv import MAX_DENSITY, MAX_GROUPED
from gossamer.ops.conv import Window


def sparsify(weight, density):
    weight.data[torch.rand_like(weight) > density] = 0


def model(density=0.1, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 40, 1),
        nn.Conv2d(40, 24, 1, stride=(2, 3), bias=False),
        nn.Conv2d(24, 24, 3, 1, 1, groups=24),
        nn.Conv2d(24, 20, 3, 2, "valid"),
    )
    for place in (2, 3, 5):
        sparsify(net[place].weight, density)
    return net.to(dtype).eval()


class Block(nn.Module):
    """A residual block, whose own forward no chain sees through."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width, affine=False),
        )

    def forward(self, x):
        return x + self.body(x)


def normed():
    """Batch norms of every kind, nested Sequentials, what no chain can take along, and a block."""
    torch.manual_seed(1)
    inner = nn.Sequential(
        nn.Conv2d(12, 12, 3, 2, 1, groups=12), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
    )
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        inner, nn.Conv2d(12, 20, 1), nn.BatchNorm2d(20), nn.Dropout(), nn.ReLU6(),
        nn.Conv2d(20, 8, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(8), nn.Tanh(),
        Block(8), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        elif isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 3:
            sparsify(module.weight, 0.2)
    return net.eval()


def test_compress_replaces_convolutions_and_says_why_not_others():
    net, x = model(), torch.randn(2, 3, 21, 19)
    expected = net(x)
    result = compress(net)
    assert all(isinstance(net[place], PackedConv2d) for place in (2, 3, 5))
    assert isinstance(net[4], DepthwiseConv2d)
    assert type(net) is ConvChain and isinstance(net, nn.Sequential)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    records = {layer.name: layer for layer in result.layers}
    assert records["0"].reason == "no zeros" and records["0"].kernel is None
    assert all("-conv/" in records[n].kernel and not records[n].reason for n in "235")
    assert records["4"].kernel.startswith("depthwise-conv/") and records["4"].shape == (24, 9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n[2].weight.data.normal_(), "no zeros"),
        (lambda n: sparsify(nn.init.ones_(n[2].weight), 0.4), f"at most {MAX_DENSITY}"),
        (lambda n: n[2].weight.data[4:].normal_(), f"at most {MAX_GROUPED}"),
        (lambda n: n.bfloat16(), "bfloat16"),
        (lambda n: n.double(), "no kernel for torch.float64"),
        (lambda n: setattr(n[2], "padding_mode", "circular"), "otherwise padded"),
        (lambda n: setattr(n[2], "dilation", (2, 2)), "dilated"),
    ],
)
def test_refusals(change, words):
    net = model()
    change(net)
    reasons = {layer.name: layer.reason for layer in compress(net).layers}
    assert words in reasons["2"] and isinstance(net[2], nn.Conv2d)


def test_grouped_outputs_are_served_at_higher_density():
    net = nn.Sequential(nn.Conv2d(16, 16, 3, 1, "same"))
    keep = (torch.rand(4, 1, 16, 3, 3) < 0.3).expand(-1, 4, -1, -1, -1).reshape(16, 16, 3, 3)
    net[0].weight.data *= keep
    expected = net(x := torch.randn(1, 16, 9, 9))
    assert "tiled-conv" in compress(net).layers[0].kernel
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_round_trip(tmp_path):
    net, x = model(), torch.randn(1, 3, 18, 18)
    compress(net)
    save(net, tmp_path / "net")
    back = load(tmp_path / "net", model=model(1.0))
    assert isinstance(back[2], PackedConv2d) and back[3].window.stride == (2, 3)
    assert isinstance(back[4], DepthwiseConv2d) and type(back) is ConvChain
    with torch.inference_mode():
        assert torch.equal(back(x), net(x))
    dense = model(1.0)
    dense.load_state_dict(unpack(copy.deepcopy(net)).state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(dense(x), net(x), rtol=1e-4, atol=1e-5)
    for wrong in (nn.Conv2d(16, 40, 1, dilation=2), nn.Conv2d(4, 40, 2), nn.Linear(16, 40)):
        other = model()
        other[2] = wrong
        with pytest.raises(FormatError, match="no linear layer of that shape"):
            load(tmp_path / "net", model=other)
        assert isinstance(other[3], nn.Conv2d)


def test_chains_fold_norms_and_activations_and_leave_the_model_as_it_is(tmp_path):
    net, x = normed(), torch.randn(2, 3, 30, 26)
    with torch.no_grad():
        expected = net(x)
    compress(net)
    assert type(net) is ConvChain and type(net[12].body) is ConvChain
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
        stages = len(net._plan[1])
        assert stages < 9  # of 18 modules
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    save(net, tmp_path / "net")
    back = load(tmp_path / "net", model=normed())
    with torch.no_grad():
        assert torch.equal(back(x), net(x))


def test_chains_follow_changes_and_step_back_for_hooks_and_training():
    net, x = normed(), torch.randn(1, 3, 16, 16)
    compress(net)
    plain = lambda: nn.Sequential.forward(net, x)  # noqa: E731
    with torch.no_grad():
        first = net(x)
        torch.testing.assert_close(first, plain(), rtol=1e-4, atol=1e-4)
        net[4].values.mul_(2)
        net[5].running_mean.add_(1)
        assert not torch.allclose(net(x), first)
        torch.testing.assert_close(net(x), plain(), rtol=1e-4, atol=1e-4)
        seen = []
        handle = net[5].register_forward_hook(lambda *_: seen.append(1))
        net(x)
        handle.remove()
        net(x)
        assert seen == [1]
        mean = net[1].running_mean.clone()
        net[1].train()
        net(x)
        assert not torch.equal(net[1].running_mean, mean)
    assert net.eval()(x.requires_grad_()).shape == first.shape


def test_new_values_and_bad_input():
    weight = torch.randn(6, 5) * (torch.rand(6, 5) < 0.5)
    layer = PackedConv2d(BitmapLinear.from_matrix(weight, torch.randn(6)))
    x = torch.randn(1, 5, 4, 4)
    first = layer(x)
    assert torch.equal(layer.to_matrix(), weight) and "density" in repr(layer)
    with torch.no_grad():
        layer.values.mul_(2)
    bias = layer.bias.reshape(-1, 1, 1)
    torch.testing.assert_close(layer(x) - bias, 2 * (first - bias), rtol=1e-4, atol=1e-5)
    conv = nn.Conv2d(5, 6, 3, (3, 2), 1)
    packed = BitmapLinear.from_matrix(as_matrix(conv), conv.bias)
    torch.testing.assert_close(
        PackedConv2d.from_conv(conv, packed)(x), conv(x), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UsageError, match="5 channels"):
        layer(torch.randn(1, 6, 4, 4))
    for window in (Window((1, 1), (0, 0)), Window((3, 3), (1, 3)), Window((1, 1), (1, 3), (1, 1))):
        with pytest.raises(UsageError, match="stride"):
            PackedConv2d(BitmapLinear.from_matrix(weight), window)
    with pytest.raises(UsageError, match="do not fit a kernel"):
        PackedConv2d(BitmapLinear.from_matrix(weight), Window((2, 2)))
