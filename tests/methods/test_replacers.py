"""Every method that replaces layers: what holds of the new layers, of folding and of refusals."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from examples import REPLACERS
from torch import nn

import gossamer as gs

DENSITY = 0.6


def build(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(48, 40, bias=bias), nn.ReLU(), nn.Linear(40, 54, bias=bias), nn.Conv1d(3, 3, 3)
    )


def data(seed=0):
    return torch.randn(7, 48, generator=torch.Generator().manual_seed(seed))


def run(model, x):
    return model[2](model[1](model[0](x)))


@pytest.mark.parametrize("name", REPLACERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_new_layers_train_save_and_fold(name, dtype, bias, tmp_path):
    model = build(bias).to(dtype)
    old = copy.deepcopy(model)
    result = gs.replace_layers(model, REPLACERS[name](), density=DENSITY)
    assert [x.name for x in result.layers] == ["0", "2"] and result.model is model
    assert [(x.name, x.kind) for x in result.left_out] == [("3", "Conv1d")]
    weights = sum(p.numel() for i in (0, 2) for n, p in model[i].named_parameters() if n != "bias")
    assert result.measured_density == pytest.approx(weights / (48 * 40 + 40 * 54))
    assert all(0 < x.density <= DENSITY for x in result.layers)
    if bias:
        assert torch.equal(model[0].bias, old[0].bias)
    assert all(p.dtype == dtype for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (run(model, data().to(dtype)).float() - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0]
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = copy.deepcopy(old)
    gs.replace_layers(again, REPLACERS[name](), density=DENSITY, seed=5)
    again.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    x = data(1).to(dtype)
    assert torch.equal(run(again, x), run(model, x))
    before = run(model, x)
    assert gs.fold_layers(model) == ("0", "2")
    assert [type(m) for m in model] == [type(m) for m in old]
    assert list(model.state_dict()) == list(old.state_dict())
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(run(model, x), before, **close)


@pytest.mark.parametrize("name", REPLACERS)
def test_gradients_are_those_of_the_folded_layer(name):
    model = build().double()
    gs.replace_layers(model, REPLACERS[name](), density=DENSITY)
    for layer in (model[0], model[2]):
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
        inputs = (x, *layer.parameters())
        names = [n for n, _ in layer.named_parameters()]

        def call(x, *parameters, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        folded = layer.fold()
        torch.testing.assert_close(folded(x), layer(x))


@pytest.mark.parametrize("name", REPLACERS)
def test_the_seed_decides_and_frozen_layers_stay_frozen(name):
    first, second = build(), build()
    for model in (first, second):
        model[0].requires_grad_(False)
        gs.replace_layers(model.eval(), REPLACERS[name](), density=DENSITY, seed=3)
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in first[0].parameters())
    assert all(p.requires_grad for p in first[2].parameters())
    assert not first[0].training
    assert not any(p.requires_grad for p in first[0].fold().parameters())


@pytest.mark.parametrize("name", REPLACERS)
def test_refusals_come_before_anything_changes(name):
    model, method = build(), REPLACERS[name]()
    kinds = [type(m) for m in model.modules()]
    for match, more in {
        r"0: .*density": {"density": 0.01},
        "density": {"density": 1.5},
        "matches no layer": {"exclude": ("none",)},
        "3: cannot be replaced: a Conv1d": {"include": ("3",)},
        "no layer to replace": {"exclude": ("0", "2")},
    }.items():
        with pytest.raises(gs.UsageError, match=match):
            gs.replace_layers(model, method, **{"density": DENSITY, **more})
        assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(gs.UsageError, match="instance"):
        gs.replace_layers(model, type(method), density=DENSITY)
    with pytest.raises(gs.UsageError, match="Sequential"):
        gs.replace_layers(nn.Linear(48, 40), method, density=DENSITY)


@pytest.mark.parametrize("name", REPLACERS)
def test_a_language_model_keeps_its_head_and_saves_once_folded(name, tiny_llama, tmp_path):
    model, ids = tiny_llama(), torch.randint(0, 256, (2, 9))
    result = gs.replace_layers(model, REPLACERS[name](), density=DENSITY)
    assert len(result.layers) == 14
    assert {x.name for x in result.left_out} == {"lm_head", "model.embed_tokens"}
    with pytest.raises(gs.UsageError, match="fold_layers"):
        gs.save(model, tmp_path / "unfolded")
    with torch.no_grad():
        before = model(ids).logits
        gs.fold_layers(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    gs.save(model, tmp_path / "folded")
    loaded = gs.load(tmp_path / "folded")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_shared_layers_are_replaced_under_both_names():
    layer = nn.Linear(48, 48)
    model = nn.ModuleDict({"a": layer, "b": layer})
    gs.replace_layers(model, gs.weights.Monarch(), density=0.5)
    assert model["a"] is model["b"] and not isinstance(model["a"], nn.Linear)
    gs.fold_layers(model)
    assert model["a"] is model["b"] and type(model["a"]) is nn.Linear


@dataclass(frozen=True)
class NeedsNorms:
    """Replaces a layer by one scaled by its first input norm, to show that statistics arrive."""

    card: ClassVar[gs.Card] = gs.Card(
        "toy", "weights", "replacer", ("norm",), ("unstructured",), 2000, "", "experimental"
    )

    def replace(self, layer, stats, density, generator):
        new = copy.deepcopy(layer)
        new.weight.data.mul_(float(stats.norm[0]))
        return new


def test_statistics_are_gathered_of_the_model_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    old, x = copy.deepcopy(model), torch.randn(5, 4)
    with pytest.raises(gs.UsageError, match="pass data="):
        gs.replace_layers(model, NeedsNorms(), density=1.0)
    gs.replace_layers(model, NeedsNorms(), density=1.0, data=[x])
    hidden = old[0](x)
    torch.testing.assert_close(model[0].weight, old[0].weight * x[:, 0].norm())
    torch.testing.assert_close(model[1].weight, old[1].weight * hidden[:, 0].norm())
