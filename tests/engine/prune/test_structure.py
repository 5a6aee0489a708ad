"""Cutting channels out: the smaller network computes what the masked one does."""

import copy

import pytest
import torch
from torch import nn

import gossamer as gs

pytest.importorskip("torch_pruning")


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.c1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(outputs)
        self.c2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.b2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity()
        if inputs != outputs:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        inner = self.b2(self.c2(torch.relu(self.b1(self.c1(x)))))
        return torch.relu(inner + self.short(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.a, self.b = Block(8, 8), Block(8, 16)
        self.flat, self.fc = nn.Flatten(), nn.Linear(16 * 4, 10)

    def forward(self, x):
        return self.fc(self.flat(nn.functional.avg_pool2d(self.b(self.a(self.stem(x))), 4)))


class Depthwise(nn.Module):
    """padding 0 in the depthwise layer where constants are to fold exactly."""

    def __init__(self, padding=1):
        super().__init__()
        self.p1, self.n1 = nn.Conv2d(1, 12, 1), nn.BatchNorm2d(12)
        self.dw = nn.Conv2d(12, 12, 3, padding=padding, groups=12)
        self.n2 = nn.BatchNorm2d(12)
        self.p2, self.n3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.n2(self.dw(torch.relu(self.n1(self.p1(x))))))
        return self.fc(torch.relu(self.n3(self.p2(x))).mean((2, 3)))


def build(kind, **more):
    torch.manual_seed(0)
    model = kind(**more)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def silence(model, x, channels, shift):
    """Zero what writes the channels; with `shift` norms keep their shift, a constant."""
    modules = dict(model.named_modules())
    for name in (*x.layers, *x.norms, *x.depthwise):
        modules[name].weight.data[channels] = 0
        if modules[name].bias is not None and not (shift and name in x.norms):
            modules[name].bias.data[channels] = 0


EXAMPLE = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_sets_of_a_residual_and_of_a_depthwise_network():
    sets = gs.coupled_channels(build(Residual), EXAMPLE)
    found = {x.layers: x for x in sets}
    assert set(found) == {("a.c1",), ("b.c1",), ("a.c2", "stem.0"), ("b.c2", "b.short.0")}
    stream = found[("a.c2", "stem.0")]
    assert stream.norms == ("a.b2", "stem.1") and stream.width == 8
    assert stream.readers == ("a.c1", "b.c1", "b.short.0")
    assert found[("b.c2", "b.short.0")].readers == ("fc",)
    first, second = gs.coupled_channels(build(Depthwise), EXAMPLE)[::-1]
    one = first if first.width == 12 else second
    assert (one.layers, one.norms, one.depthwise) == (("p1",), ("n1", "n2"), ("dw",))
    assert one.readers == ("p2",)
    assert not gs.coupled_channels(build(Depthwise), EXAMPLE, exclude=("p1", "p2"))


@pytest.mark.parametrize("kind", [Residual, Depthwise])
def test_the_shrunk_network_equals_the_masked_one(kind):
    model = build(kind)
    sets = gs.coupled_channels(model, EXAMPLE)
    for index, x in enumerate(sets):
        silence(model, x, list(range(index, x.width, 3)), shift=False)
    before = copy.deepcopy(model.state_dict())
    result = gs.remove_channels(model, EXAMPLE)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    other = torch.randn(9, 1, 8, 8)
    torch.testing.assert_close(result.model(other), model(other), rtol=1e-4, atol=1e-5)
    assert result.deviation < 1e-5
    assert result.removed == {x.layers[0]: len(range(i, x.width, 3)) for i, x in enumerate(sets)}
    count = sum(p.numel() for p in result.model.parameters())
    assert result.parameters == (sum(p.numel() for p in model.parameters()), count)
    assert count < 0.7 * result.parameters[0] and result.flops[1] < 0.7 * result.flops[0]
    result.model.train()
    result.model(other).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


def test_constants_fold_exactly_where_nothing_pads_them():
    model = build(Depthwise, padding=0)
    for x in gs.coupled_channels(model, EXAMPLE):
        silence(model, x, [0, 2, 3], shift=True)
    result = gs.remove_channels(model, EXAMPLE)
    assert set(result.removed.values()) == {3} and result.deviation < 1e-5
    dropped = copy.deepcopy(result.model)
    dropped.fc.bias.data.copy_(model.fc.bias)
    with torch.no_grad():
        assert float((dropped(EXAMPLE) - model(EXAMPLE)).abs().max()) > 0.01, "the fold mattered"


def test_the_fold_of_a_padded_constant_is_near_and_its_error_is_told():
    model = build(Residual)
    x = next(s for s in gs.coupled_channels(model, EXAMPLE) if s.layers == ("a.c1",))
    model.a.b1.bias.data[:2] = 1.0
    model.a.b1.weight.data[:2] = 0
    kept = gs.remove_channels(model, EXAMPLE, [x])
    assert kept.removed == {} and kept.deviation == 0
    assert "approximate=True" in kept.left_out["a.c1"]
    result = gs.remove_channels(model, EXAMPLE, [x], approximate=True)
    assert result.removed == {"a.c1": 2} and result.left_out == {}
    exact = float((result.model(EXAMPLE) - model(EXAMPLE)).detach().abs().max())
    assert result.deviation == pytest.approx(exact, abs=1e-6) and exact > 1e-4
    plain = copy.deepcopy(result.model)
    plain.a.c2.bias.data.zero_()
    assert exact < float((plain(EXAMPLE) - model(EXAMPLE)).detach().abs().max())


def test_one_channel_stays_and_nothing_dead_changes_nothing():
    model = build(Depthwise)
    result = gs.remove_channels(model, EXAMPLE)
    assert result.removed == {} and torch.equal(result.model(EXAMPLE), model(EXAMPLE))
    for x in gs.coupled_channels(model, EXAMPLE):
        silence(model, x, slice(None), shift=False)
    result = gs.remove_channels(model, EXAMPLE)
    assert (
        result.model.p1.out_channels == result.model.dw.groups == result.model.fc.in_features == 1
    )
    assert result.deviation < 1e-6


def test_layers_that_cannot_be_cut_are_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    sets = gs.coupled_channels(model, torch.randn(3, 4))
    assert [x.layers for x in sets] == [("2",)]
    assert gs.fixed_channels(model, torch.randn(3, 4)) == {
        "0": "1 (LayerNorm): it is no kind of layer that can be cut along",
        "4": "no Linear or Conv2d reads them: they reach the model's output",
    }
    with pytest.raises(gs.UsageError, match="names no layer"):
        gs.coupled_channels(model, torch.randn(3, 4), exclude=("9",))


def test_what_a_regulariser_zeroed_is_cut_out_and_the_rest_trains_on():
    model = build(Residual).train()
    sets = gs.coupled_channels(model, EXAMPLE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method = gs.weights.WGSEF(0.5, sets, strength=10.0, until=0.5)
    with gs.sparse_training(model, optimizer, method, total_steps=6, exclude=("fc",)) as run:
        for _ in range(6):
            optimizer.zero_grad()
            model(EXAMPLE).square().mean().backward()
            optimizer.step()
    assert torch.equal(run.masks["a.c2"].any(1), run.masks["stem.0"].any(1))
    result = gs.remove_channels(model, EXAMPLE, approximate=True)
    assert result.removed == {x.layers[0]: x.width // 2 for x in sets}
    assert result.flops[1] < 0.35 * result.flops[0] and result.model.fc.in_features == 32
    assert result.model.training and result.deviation < 1.0
    result.model(EXAMPLE).sum().backward()
