"""Which layers are replaced, what moves with them, and the way back."""

import copy

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.nn import BitmapLinear, ConvChain, DepthwiseConv2d, PackedConv2d, to_dense


def sparse(net, density=0.2):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand_like(parameter) > density] = 0
    return net.eval()


def mlp():
    torch.manual_seed(0)
    return sparse(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))


def compress(net, **options):
    return gs.compress(net, latency="rule", **options)


def reasons(result):
    return {record.name: record.reason for record in result.layers}


class Scaled(nn.Linear):
    def forward(self, input):
        return 3 * super().forward(input)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Named(nn.Linear):
    """Does what a Linear does."""


class Reader(nn.Module):
    """Multiplies by one layer's weight, calls another and asks a third for its dtype."""

    def __init__(self):
        super().__init__()
        self.read, self.called, self.asked = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        x = self.asked(self.called(x).to(self.asked.weight.dtype))
        return x if isinstance(self.asked.weight, torch.Tensor) else None


class Sly(nn.Module):
    """Reads a weight in a way that no one sees."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, x):
        for layer in self.layers:
            x = x @ layer.weight.t() + layer.bias
        return x


def test_subclasses_with_a_forward_of_their_own_stay():
    net = nn.Sequential(Scaled(64, 64), Named(64, 64), nn.Unflatten(1, (4, 4, 4)))
    net.append(Standardised(4, 8, 3)).append(nn.Conv2d(8, 8, 1))
    sparse(net)
    x = torch.randn(3, 64)
    wanted = net(x)
    found = reasons(compress(net))
    assert "Scaled has a forward of its own" in found["0"]
    assert "Standardised has a forward of its own" in found["3"]
    assert found["1"] is None and isinstance(net[1], BitmapLinear)
    torch.testing.assert_close(net(x), wanted)


def test_hooks_of_every_kind_go_on_working():
    net, seen, x = mlp(), [], torch.randn(3, 64)
    layer = net[0]
    handles = [
        layer.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
        layer.register_forward_pre_hook(lambda m, a, k: seen.append("kwargs"), with_kwargs=True),
        layer.register_forward_hook(lambda m, a, y: y + 1),
        layer.register_forward_hook(lambda m, a, k, y: seen.append(len(a)), with_kwargs=True),
        layer.register_forward_hook(lambda m, a, y: seen.append("always"), always_call=True),
        layer.register_full_backward_hook(lambda m, i, o: seen.append("back")),
        layer.register_full_backward_pre_hook(lambda m, o: seen.append("before")),
    ]
    wanted = net(x)
    before = list(seen)
    seen.clear()
    compress(net)
    assert isinstance(net[0], BitmapLinear)
    y = net(x.clone().requires_grad_())
    torch.testing.assert_close(y, wanted)
    assert seen == before == ["kwargs", 1, "always"]
    y.sum().backward()
    assert seen[3:] == ["before", "back"]
    for handle in handles:
        handle.remove()
    seen.clear()
    net(x)
    assert seen == []
    gs.unpack(net)[0].register_forward_hook(lambda m, a, y: seen.append("new"))
    net(x)
    assert seen == ["new"]


def test_layers_with_hooks_on_their_state_stay():
    net = mlp()
    net[0].register_state_dict_post_hook(
        lambda m, state, prefix, meta: state.update({prefix + "old": state[prefix + "weight"]})
    )
    net[2]._register_load_state_dict_pre_hook(lambda *args: None)
    found = reasons(compress(net))
    assert "state dict" in found["0"] and "state dict" in found["2"]
    net.state_dict()


def test_what_others_set_on_a_layer_stays_with_it():
    net = mlp().train()
    layer, bias = net[0], net[0].bias
    layer.my_tag, layer.other = "tag", [1]
    layer.register_buffer("mine", torch.ones(2))
    layer.register_buffer("passing", torch.ones(2), persistent=False)
    layer.extra, layer.inner = nn.Parameter(torch.ones(1)), nn.Dropout()
    bias.requires_grad_(False)
    net[2].eval()
    names = set(net.state_dict()) - {"0.weight", "2.weight"}
    compress(net)
    packed = net[0]
    assert isinstance(packed, BitmapLinear) and packed.bias is bias and not bias.requires_grad
    assert packed.training and not net[2].training and net[2].bias.requires_grad
    assert (packed.my_tag, packed.other, packed.extra.item()) == ("tag", [1], 1)
    assert names <= set(net.state_dict()) and "0.passing" not in net.state_dict()
    packed.later = 5
    back = gs.unpack(net)[0]
    assert type(back) is nn.Linear and back.training and back.bias is bias
    assert (back.my_tag, back.later, back.inner.p) == ("tag", 5, 0.5)
    assert set(net.state_dict()) == names | {"0.weight", "2.weight"}
    assert vars(back).keys() - {"my_tag", "other", "later"} == vars(nn.Linear(1, 1)).keys()


def test_a_layer_with_a_tensor_of_a_packed_layer_s_name_stays():
    net = mlp()
    net[0].register_buffer("values", torch.ones(3))
    assert "name that packed layers use" in reasons(compress(net))["0"]


def test_weights_that_a_parent_reads_stay_with_it():
    net = sparse(Reader())
    x = torch.randn(3, 64)
    wanted = net(x)
    found = reasons(compress(net))
    assert "in Reader.forward" in found["read"]
    assert found["called"] is None and found["asked"] is None
    torch.testing.assert_close(net(x), wanted)


def test_weights_read_unseen_are_right_all_the_same():
    net = sparse(Sly())
    x = torch.randn(3, 64)
    wanted = net(x)
    assert reasons(compress(net)) == {"layers.0": None, "layers.1": None}
    torch.testing.assert_close(net(x), wanted)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_torch_s_own_transformers(bits, padded):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0)
    net = sparse(nn.TransformerEncoder(layer, 2))
    x = torch.randn(3, 7, 64)
    options = {}
    if padded:
        options["src_key_padding_mask"] = torch.arange(7) >= torch.tensor([[7], [5], [3]])
    keep = slice(None) if not padded else ~options["src_key_padding_mask"]
    wanted = {mode: net.train(mode)(x, **options)[keep] for mode in (False, True)}
    found = reasons(compress(net, bits=bits))
    assert "MultiheadAttention" in found["layers.0.self_attn.out_proj"]
    assert found["layers.0.linear1"] is None
    bound = 1e-4 if bits is None else 0.05
    for mode, grad in ((False, False), (False, True), (True, False), (True, True)):
        with torch.set_grad_enabled(grad):
            got = net.train(mode)(x, **options)[keep]
        torch.testing.assert_close(got, wanted[mode], rtol=bound, atol=bound)


def test_other_transformers_of_torch():
    net = sparse(nn.Transformer(64, 4, 1, 1, 128, dropout=0, batch_first=True))
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        wanted = net(x, x)
        compress(net)
        torch.testing.assert_close(net(x, x), wanted, rtol=1e-4, atol=1e-4)


def test_one_module_under_two_names_stays_one():
    shared = nn.Linear(64, 64)
    net = sparse(nn.Sequential(shared, nn.ReLU(), shared))
    x = torch.randn(3, 64)
    wanted = net(x)
    compress(net)
    assert isinstance(net[0], BitmapLinear) and net[0] is net[2]
    torch.testing.assert_close(net(x), wanted)
    assert gs.unpack(net)[0] is net[2]


def test_include_and_exclude():
    net = mlp()
    found = compress(net, exclude=("2",))
    assert reasons(found) == {"0": None, "2": "left out by `include` or `exclude`"}
    assert compress(mlp(), include=("2",), strict=True).layers[0].kernel is None
    for wrong in ("3", "*.fc"):
        with pytest.raises(gs.UsageError, match="near names"):
            compress(mlp(), exclude=(wrong,))
    with pytest.raises(gs.UsageError, match="sequence of patterns"):
        compress(mlp(), include="0")


def test_the_whole_model_is_accounted_for():
    net = nn.Sequential(mlp(), nn.LayerNorm(64), nn.Unflatten(1, (1, 64)), nn.Conv1d(1, 4, 3))
    net.append(nn.Linear(62, 8))
    with torch.no_grad():
        net[3].weight[:2] = 0
        net[4].weight[0] = 0
    result = compress(net, max_density=0.5)
    there = result.coverage
    total = 2 * (64 * 64 + 64) + 128 + 16 + 62 * 8 + 8
    assert there.total == total and there.packed == 2 * 64 * 64
    assert there.matrices == 2 * 64 * 64 + 12 + 62 * 8
    kept = sum(round(net[0][i].density * 64 * 64) for i in (0, 2))
    assert there.nonzero == kept + 2 * 64 + 64 + 6 + 4 + 62 * 7 + 8  # the norm's bias is zero
    assert [(left.name, left.count) for left in there.left_out] == [
        ("3.weight", 12), ("4.weight", 496),
    ]  # fmt: skip
    assert "Conv1d" in there.left_out[0].reason and "above 0.50" in there.left_out[1].reason
    assert gs.compress(net, latency="rule", max_density=0.5).coverage == there


def test_what_cannot_be_seen_is_refused_or_left():
    with torch.device("meta"):
        hollow = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(gs.UsageError, match=r"0\.weight is on the meta device"):
        compress(hollow)
    lazy = nn.Sequential(mlp()[0], nn.LazyLinear(8))
    assert "no shape yet" in reasons(compress(lazy))["1"] and isinstance(lazy[0], BitmapLinear)
    small = mlp()
    small[0].weight = nn.Parameter(small[0].weight.data.to(torch.float8_e4m3fn), False)
    assert "float8" in reasons(compress(small))["0"]


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Leaky(nn.ReLU):
    def forward(self, x):
        return nn.functional.leaky_relu(x, 0.5)


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


class Wide(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "inside",
    [
        NormAct(16), Leaky(), Doubled(nn.BatchNorm2d(16), nn.ReLU()), nn.LeakyReLU(),
        Backwards(nn.ReLU(), nn.BatchNorm2d(16)), Wide(16, 16, 3, 1, 1, groups=16),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_chains_take_along_only_what_they_know(inside):
    net = nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), inside, nn.Conv2d(16, 8, 1))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    sparse(net, 0.15)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        wanted = net(x)
        compress(net)
        assert type(net) is ConvChain and isinstance(net[0], PackedConv2d)
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)


def test_chains_see_forwards_and_hooks_that_come_later():
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    sparse(net, 0.15)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        compress(net)
        first = net(x)
        net[1].forward = lambda x: x
        assert not torch.allclose(net(x), first)
        del net[1].forward
        everywhere = nn.modules.module.register_module_forward_hook(lambda m, a, y: y + 1)
        assert not torch.allclose(net(x), first)
        everywhere.remove()
        torch.testing.assert_close(net(x), first)


def test_depthwise_convolutions_keep_gradients_and_hooks():
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, 2, 1, groups=16))
    sparse(net, 0.2)
    plain, seen = copy.deepcopy(net), []
    net[1].register_forward_hook(lambda m, a, y: seen.append(1))
    compress(net)
    assert isinstance(net[1], DepthwiseConv2d) and net[1].kernel_size == (3, 3)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)
    net(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(net[1].weight.grad, plain[1].weight.grad, rtol=1e-3, atol=1e-3)
    assert seen
    torch.testing.assert_close(net.double()(x.double()), plain.double()(x.double()))


def test_unpack_gives_ordinary_layers_of_every_kind():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    turned = transformers.pytorch_utils.Conv1D(48, 64)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False), nn.Flatten(), Named(64, 64), turned,
    )  # fmt: skip
    sparse(net)
    plain, x = copy.deepcopy(net), torch.randn(3, 8, 4, 4)
    wanted = plain(x)
    result = compress(net, max_density=0.3)
    assert net[7].weight.shape == (64, 48) and net[7].nf == 48 and net[0].stride == (2, 2)
    torch.testing.assert_close(net[7].weight + 0, plain[7].weight.detach())
    assert gs.unpack(result) is net
    assert [type(module) for module in net] == [type(module) for module in plain]
    assert type(net) is nn.Sequential
    torch.testing.assert_close(net(x), wanted)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in net.parameters())
    repr(net)
    torch.optim.SGD(net.parameters(), 0.1)


def test_unpack_says_that_integers_stay_rounded_and_takes_single_layers():
    net = mlp()
    x = torch.randn(3, 64)
    wanted = net(x)
    compress(net, bits=8)
    with pytest.warns(UserWarning, match="2 layers held integers"):
        gs.unpack(net)
    torch.testing.assert_close(net(x), wanted, rtol=0.05, atol=0.05)
    alone = BitmapLinear.from_matrix(torch.eye(64), torch.ones(64))
    assert type(to_dense(alone)) is nn.Linear and torch.equal(to_dense(alone).weight, torch.eye(64))
    kept = nn.Sequential(PackedConv2d(BitmapLinear.from_matrix(torch.eye(8)[:, :6])))
    assert to_dense(kept)[0](torch.ones(1, 6, 2, 2)).shape == (1, 8, 2, 2)
