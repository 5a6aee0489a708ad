"""Every kind of layer and operation that channels may pass: cut rightly, or left out with a reason."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import gossamer as gs

pytest.importorskip("torch_pruning")

IMAGE, ROWS = torch.randn(2, 3, 12, 12), torch.randn(4, 16)


class Op(nn.Module):
    """A function as a layer without a name of its own in the graph."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Scale(nn.Module):
    def __init__(self, parameter):
        super().__init__()
        values = torch.rand(8, 1, 1) + 0.5
        if parameter:
            self.k = nn.Parameter(values)
        else:
            self.register_buffer("k", values)

    def forward(self, x):
        return x * self.k


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).cumsum(1)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


def inverted_residual():
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU(), SqueezeExcite()
    )


def hooked():
    layer = nn.BatchNorm2d(8)
    layer.register_forward_hook(lambda module, args, output: output.flip(1))
    return layer


def patched():
    layer = nn.BatchNorm2d(8)
    layer.forward = lambda x: x.flip(1)
    return layer


CUT = {  # what is between Conv2d(3, 8) and Conv2d(the number, 4)
    "batch norm": (lambda: nn.BatchNorm2d(8), 8),
    "batch norm without scale": (lambda: nn.BatchNorm2d(8, affine=False), 8),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), 8),
    "instance norm": (lambda: nn.InstanceNorm2d(8), 8),
    "instance norm with statistics": (lambda: nn.InstanceNorm2d(8, track_running_stats=True), 8),
    "instance norm with scale": (lambda: nn.InstanceNorm2d(8, affine=True), 8),
    "relu in place": (lambda: nn.ReLU(inplace=True), 8),
    "gelu": (nn.GELU, 8),
    "one slope": (nn.PReLU, 8),
    "slopes": (lambda: nn.PReLU(8), 8),
    "dropout": (lambda: nn.Dropout2d(0.5), 8),
    "max pooling": (lambda: nn.MaxPool2d(2), 8),
    "upsampling": (lambda: nn.Upsample(scale_factor=2), 8),
    "square": (lambda: Op(torch.square), 8),
    "channels last": (lambda: Op(lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)), 8),
    "concatenation with itself": (lambda: Op(lambda x: torch.cat([x, x.relu()], 1)), 16),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), 8),
}
LEFT = {  # the same, with a word of the reason
    "group norm": (lambda: nn.GroupNorm(2, 8), 8, "GroupNorm"),
    "group norm without scale": (lambda: nn.GroupNorm(4, 8, affine=False), 8, "GroupNorm"),
    "group norm as a function": (lambda: Op(lambda x: F.group_norm(x, 2)), 8, "GroupNorm"),
    "layer norm as a function": (
        lambda: Op(lambda x: F.layer_norm(x, x.shape[1:])),
        8,
        "changes the output",
    ),
    "response norm": (lambda: nn.LocalResponseNorm(3), 8, "changes the output"),
    "unit length": (lambda: Op(lambda x: F.normalize(x, dim=1)), 8, "changes the output"),
    "softmax": (lambda: nn.Softmax(1), 8, "Softmax"),
    "shuffle": (lambda: nn.ChannelShuffle(2), 8, "ChannelShuffle"),
    "flip": (lambda: Op(lambda x: x.flip(1)), 8, "Flip"),
    "minus the mean": (lambda: Op(lambda x: x - x.mean(1, keepdim=True)), 8, "Mean"),
    "over the count": (lambda: Op(lambda x: x / x.shape[1]), 8, "changes the output"),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), 2, "merged"),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), 32, "forward fail"),
    "glu": (lambda: nn.GLU(1), 4, "merged"),
    "halves": (lambda: Op(lambda x: x[:, :4] * x[:, 4:]), 4, "cutting them"),
    "every second": (lambda: Op(lambda x: x[:, ::2]), 4, "forward fail"),
    "the largest": (lambda: Op(lambda x: x.amax(1, keepdim=True)), 1, "merged"),
    "buffer": (lambda: Scale(False), 8, "forward fail"),
    "parameter": (lambda: Scale(True), 8, "parameter"),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=2), 8, "grouped"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 2), 8, "ConvTranspose2d"),
    "own convolution": (lambda: OwnConv(8, 8, 1), 8, "OwnConv"),
    "own norm": (lambda: OwnNorm(8), 8, "OwnNorm"),
    "hook": (hooked, 8, "forward hook"),
    "patch": (patched, 8, "its forward is replaced"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), 8, "remove_param"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)), 8, "remove"),
    "torch's mask": (lambda: prune.l1_unstructured(nn.Conv2d(8, 8, 1), "weight", 0.3), 8, "prune"),
    "noise": (lambda: Op(lambda x: x + torch.randn_like(x)), 8, "changes the output"),
    "fixed view": (lambda: Op(lambda x: x.view(-1, 8, 10, 10)), 8, "fail"),
}


def net(make, width, padding=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.Conv2d(width, 4, 3, padding=padding))
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def kill(layer, channels, bias=False):
    with torch.no_grad():
        layer.weight[channels] = 0
        if not bias and layer.bias is not None:
            layer.bias[channels] = 0


def same(one, other, *shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CUT)
def test_what_works_channel_by_channel_is_cut(name, bias):
    make, width = CUT[name]
    model = net(make, width)
    assert any(x.layers == ("0",) for x in gs.coupled_channels(model, IMAGE))
    kill(model[0], [1, 2, 6], bias)
    result = gs.remove_channels(model, IMAGE)
    padded_inside = name == "depthwise" and bias
    assert result.removed == ({} if padded_inside else {"0": 3})
    assert bool(result.left_out) == padded_inside
    same(result.model, model, 3, 3, 12, 12)
    same(result.model, model, 1, 3, 16, 14)
    copy.deepcopy(result.model).load_state_dict(result.model.state_dict())


@pytest.mark.parametrize("name", LEFT)
def test_what_mixes_or_is_unknown_is_left_out_with_the_reason(name):
    make, width, word = LEFT[name]
    model = net(make, width)
    assert word in gs.fixed_channels(model, IMAGE)["0"]
    assert not any("0" in x.layers for x in gs.coupled_channels(model, IMAGE))
    kill(model[0], [1, 2, 6])
    result = gs.remove_channels(model, IMAGE)
    assert result.removed == {} and result.deviation == 0 and word in result.left_out["0"]
    assert result.parameters[0] == result.parameters[1]
    if name != "noise":
        same(result.model, model, 2, 3, 12, 12)


def test_good_sets_are_cut_beside_bad_ones():
    torch.manual_seed(0)
    parts = []
    for middle in (nn.ReLU(), nn.Softmax(1), nn.BatchNorm2d(8), nn.ChannelShuffle(2), nn.GELU()):
        parts += [nn.Conv2d(3, 8, 1), middle, nn.Conv2d(8, 3, 1)]
    model = nn.Sequential(*parts).eval()
    for index in range(0, len(parts), 3):
        kill(model[index], [0, 5])
    result = gs.remove_channels(model, IMAGE)
    assert result.removed == {"0": 2, "6": 2, "12": 2} and set(result.left_out) == {"3", "9"}
    same(result.model, model, 2, 3, 9, 9)


class Branches(nn.Module):
    """A stem and a branch into one stream; the branch's norm may stand behind the sum instead."""

    def __init__(self, behind_sum):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.behind_sum = behind_sum

    def forward(self, x):
        x = self.stem(x)
        inner = self.branch(x.relu())
        x = self.norm(x + inner) if self.behind_sum else x + self.norm(inner)
        return self.last(x)


def test_a_norm_that_starts_at_zero_silences_only_what_passes_it():
    torch.manual_seed(0)
    model = Branches(False).eval()
    nn.init.zeros_(model.norm.weight)
    assert gs.remove_channels(model, IMAGE).removed == {}
    kill(model.stem, [3])
    result = gs.remove_channels(model, IMAGE)
    assert result.removed == {"branch": 1}
    same(result.model, model, 2, 3, 9, 9)
    model = Branches(True).eval()
    nn.init.zeros_(model.norm.weight)
    result = gs.remove_channels(
        model, IMAGE
    )  # the stem is read in front of the norm too, so it is alive
    assert result.removed == {}
    kill(model.stem, [3])
    result = gs.remove_channels(model, IMAGE)
    assert result.removed == {"branch": 1}
    same(result.model, model, 2, 3, 9, 9)


def test_an_inverted_residual_with_squeeze_and_excite():
    model = net(inverted_residual, 8)
    sets = gs.coupled_channels(model, IMAGE)
    one = next(x for x in sets if "0" in x.layers)
    assert one.layers == ("0", "1.3.expand") and one.depthwise == ("1.0",)
    for name in (*one.layers, *one.norms, *one.depthwise):
        kill(model.get_submodule(name), [0, 7])
    result = gs.remove_channels(model, IMAGE)
    assert result.removed["0"] == 2
    same(result.model, model, 3, 3, 12, 12)
    same(result.model, model, 1, 3, 15, 13)


class Reuse(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.d = nn.Linear(8, 2)
        if tied:
            self.c.weight = self.b.weight
        else:
            self.c = self.b

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


@pytest.mark.parametrize(("tied", "word"), [(True, "shares a parameter"), (False, "runs 2 times")])
def test_layers_and_weights_used_twice_are_left_alone(tied, word):
    torch.manual_seed(0)
    model = Reuse(tied)
    assert gs.coupled_channels(model, ROWS) == ()
    assert word in gs.fixed_channels(model, ROWS)["a"]
    kill(model.a, [0, 1])
    kill(model.b, [0, 1])
    result = gs.remove_channels(model, ROWS)
    assert result.removed == {} and word in result.left_out["a"]


class Outputs(nn.Module):
    def __init__(self, expose):
        super().__init__()
        self.a, self.b, self.expose = nn.Linear(16, 8), nn.Linear(8, 2), expose

    def forward(self, x):
        hidden = self.a(x).relu()
        more = hidden if self.expose else x.norm()
        return {"logits": (self.b(hidden), 1), "more": [more, None, (x > 0, "text")]}


def test_nested_outputs_are_compared_tensor_by_tensor():
    torch.manual_seed(0)
    model = Outputs(expose=True)
    kill(model.a, [0, 1])
    result = gs.remove_channels(model, ROWS)
    assert result.removed == {} and "reach the model's output" in result.left_out["a"]
    model.expose = False
    result = gs.remove_channels(model, ROWS)
    assert result.removed == {"a": 2} and result.model.b.in_features == 6
    with pytest.raises(gs.UsageError, match="returns no tensor"):
        gs.remove_channels(nn.Sequential(nn.Linear(16, 2), Op(lambda x: None)), ROWS)


def test_the_model_and_the_random_numbers_stay_untouched():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Counts(), nn.Conv2d(8, 4, 3))
    kill(model[0], [0, 1])
    kill(model[1], [0, 1])
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state, example = torch.get_rng_state(), IMAGE.clone()
    result = gs.remove_channels(model, example)
    assert result.removed == {"0": 2}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert flags == [m.training for m in model.modules()]
    assert flags == [m.training for m in result.model.modules()]
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(example, IMAGE)
    assert not model[0].weight.requires_grad and not result.model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_set_that_the_model_lacks_is_named():
    model = net(nn.ReLU, 8)
    other = gs.Coupled(5, ("9",), (), (), ("2",))
    assert "no such set" in gs.remove_channels(model, IMAGE, [other]).left_out["9"]


def test_half_precision_and_integer_inputs():
    torch.manual_seed(0)
    model = net(lambda: nn.BatchNorm2d(8), 8).bfloat16()
    kill(model[0], [1, 2])
    result = gs.remove_channels(model, IMAGE.bfloat16())
    assert result.removed == {"0": 2} and result.model[0].weight.dtype == torch.bfloat16
    words = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    kill(words[1], [1, 2])
    assert gs.remove_channels(words, torch.randint(0, 9, (2, 5))).removed == {"1": 2}


MENU = {  # between two convolutions of 8 channels; the second number is what comes out
    **{name: (make, width) for name, (make, width) in CUT.items()},
    **{name: (make, width) for name, (make, width, _) in LEFT.items()},
}
for gone in ("noise", "fixed view", "pixel unshuffle", "spectral norm", "the largest"):
    del MENU[gone]  # random, or bound to one size


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(sorted(MENU)), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_random_networks_with_random_dead_channels(names, residual, seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 1)]
    for name in names:
        make, width = MENU[name]
        layers += [make(), nn.Conv2d(width, 8, 3, padding=int(torch.randint(2, ())))]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*layers)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            x = self.layers(x)
            x = x + x.relu() if residual else x
            return self.last(x.mean((2, 3)))

    model = Net().eval()
    for module in model.modules():
        if type(module) is nn.Conv2d and "weight" in module._parameters:
            for channel in torch.randperm(len(module.weight))[: int(torch.randint(8, ()))]:
                kill(module, int(channel), bias=bool(torch.randint(2, ())))
    result = gs.remove_channels(model, torch.randn(2, 3, 14, 14))
    same(result.model, model, 3, 3, 14, 14)
    same(result.model, model, 1, 3, 18, 16)
    copy.deepcopy(result.model).load_state_dict(result.model.state_dict())


def test_layers_that_tracing_does_not_see_are_named():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(nn.ReLU, 8)

        @torch.no_grad()
        def forward(self, x):
            return self.inner(x)

    model = Frozen()
    kill(model.inner[0], [1])
    result = gs.remove_channels(model, IMAGE)
    assert result.removed == {} and "tracing" in result.left_out["inner.0"]
    assert set(gs.fixed_channels(model, IMAGE)) == {"inner.0", "inner.2"}


def test_it_works_in_inference_mode_and_with_frozen_layers():
    model = net(nn.ReLU, 8)
    model.requires_grad_(False)
    kill(model[0], [1, 2])
    with torch.inference_mode():
        assert gs.remove_channels(model, IMAGE).removed == {"0": 2}


@pytest.mark.parametrize(
    ("example", "word"),
    [
        ({"x": IMAGE}, "one tensor"),
        (IMAGE[:0], "not empty"),
        (torch.randn(2, 5, 9, 9), "fails on the example"),
    ],
)
def test_examples_that_do_not_fit_are_refused(example, word):
    model = net(nn.ReLU, 8)
    for call in (gs.remove_channels, gs.coupled_channels, gs.fixed_channels):
        with pytest.raises(gs.UsageError, match=word):
            call(model, example)


def test_scripted_models_are_refused():
    with pytest.raises(gs.UsageError, match=r"torch\.jit"):
        gs.remove_channels(torch.jit.trace(net(nn.ReLU, 8), IMAGE), IMAGE)
