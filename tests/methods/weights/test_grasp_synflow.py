"""GraSP and SynFlow against the authors' figures and loops by hand, and what they refuse."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import golden
import pytest
import torch
from examples import step_of
from torch import nn
from torch.func import functional_call

import gossamer as gs
from gossamer.core.allocation import LayerInfo

RECORD = golden.load("snip_grasp_synflow")
LAYERS = (("f1", "0"), ("f2", "2"), ("f3", "4"))


def recorded():
    """The network of the record and its batch."""
    inputs = RECORD["inputs"]
    model = nn.Sequential()
    for i in (1, 2, 3):
        layer = nn.Linear(*reversed(inputs[f"W{i}"]["shape"]))
        layer.weight.data.copy_(golden.draw(inputs, f"W{i}"))
        layer.bias.data.copy_(golden.draw(inputs, f"b{i}"))
        model.extend([layer, nn.ReLU()][: 2 if i < 3 else 1])
    return model, golden.draw(inputs, "X"), torch.tensor(inputs["y"]["values"])


def started(model, method, loss, **more):
    """The first masks, with the model as it was before."""
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.sparse_training(
        model, optimizer, method, total_steps=1, include=("*",), loss=loss, **more
    ) as run:
        masks = {name: mask.clone() for name, mask in run.masks.items()}
        for layer in run.layers:
            weight = before.get_submodule(layer.name).weight
            weight.data.mul_(layer.tensor(masks[layer.name]))
    for key, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert all(p.grad is None for p in model.parameters())
    assert model.training == before.training
    return masks


def cases(start):
    return [case for case in RECORD["cases"] if case["case"].startswith(start)]


@pytest.mark.parametrize("want", cases("GraSP (Synaptic-Flow"), ids=lambda x: str(x["density"]))
def test_grasp_masks_are_the_authors(want):
    model, x, y = recorded()
    masks = started(
        model, gs.weights.GraSP(want["density"]),
        lambda: nn.functional.cross_entropy(model(x), y),
    )  # fmt: skip
    for name, layer in LAYERS:
        assert golden.is_mask(masks[layer], want["mask"][name])


@pytest.mark.parametrize("want", cases("GraSP layer"), ids=lambda x: str(x["density"]))
def test_random_masks_with_the_counts_of_grasp(want):
    """Those of Random Pruning's code, which keeps one weight more in one layer."""
    model, x, y = recorded()
    density = want["density"]
    method = gs.weights.StaticRandom(density, resample=gs.weights.GraSP(density))
    masks = started(model, method, lambda: nn.functional.cross_entropy(model(x), y))
    more = [
        (1 - want["layer_sparsity"][name]) * masks[layer].numel() - int(masks[layer].sum())
        for name, layer in LAYERS
    ]
    assert sorted(round(x) for x in more) == [0, 0, 1]


@pytest.mark.parametrize(
    "want", cases("SynFlow"), ids=lambda x: f"{x['density']}, {x['rounds']} rounds"
)
def test_synflow_masks_are_the_authors(want):
    model, x, y = recorded()
    masks = started(
        model, gs.weights.SynFlow(want["density"], want["rounds"]),
        lambda: nn.functional.cross_entropy(model(x), y),
    )  # fmt: skip
    for name, layer in LAYERS:
        assert golden.is_mask(masks[layer], want["mask"][name])


def normed():
    """Batch norms in training mode, dropout, and a shared weight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3),
    )  # fmt: skip
    model[7].weight = model[5].weight
    model[1].running_mean.uniform_(-1, 1)
    return model


def test_grasp_is_the_weight_times_a_hessian_product():
    """By differences of gradients, with statistics of the batch, a shared weight, a convolution."""
    model = normed().double()
    x, y = torch.randn(16, 2, 4, 4, dtype=torch.double), torch.arange(16) % 3
    model[3].p = 0.0
    masks = started(
        model, gs.weights.GraSP(0.3, temperature=7.0),
        lambda: nn.functional.cross_entropy(model(x), y),
    )  # fmt: skip
    again = normed().double()
    again[3].p = 0.0
    weights = [again[i].weight for i in (0, 5, 9)]

    def gradient():
        loss = nn.functional.cross_entropy(again(x) / 7, y)
        return torch.autograd.grad(loss, weights)

    first, step = gradient(), 1e-4
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, g in zip(weights, first):
                weight.add_(sign * step * g)
        sides.append(gradient())
        with torch.no_grad():
            for weight, g in zip(weights, first):
                weight.sub_(sign * step * g)
    scores = [w.detach() * (a - b) for w, a, b in zip(weights, *sides)]
    scores[0] = scores[0].permute(0, 2, 3, 1).flatten(1)
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.cat([masks[name].flatten() for name in ("0", "5", "9")])
    assert list(masks) == ["0", "5", "9"]
    assert int(kept.sum()) == round(0.3 * flat.numel())
    assert flat[kept].min() >= flat[~kept].max() - 1e-6 * flat.abs().max()


def test_synflow_is_the_flow_of_ones_through_absolute_weights():
    """Round by round against a copy whose every tensor is positive, in evaluation mode."""
    model = normed()
    x = torch.randn(16, 2, 4, 4)
    masks = started(model, gs.weights.SynFlow(0.1, 5), lambda: model(x).square().mean())
    positive = normed().double().eval()
    with torch.no_grad():
        for tensor in positive.state_dict().values():
            tensor.abs_()
    names, kept = ("0", "5", "9"), None
    weights = {f"{n}.weight": positive.get_submodule(n).weight.detach() for n in names}
    for k in range(1, 6):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        output = functional_call(positive, leaves, (torch.ones(1, 2, 4, 4, dtype=torch.double),))
        slopes = torch.autograd.grad(output.sum(), list(leaves.values()))
        scores = torch.cat([(w * s).abs().flatten() for w, s in zip(weights.values(), slopes)])
        count = scores.numel() - int((1 - 0.1 ** (k / 5)) * scores.numel() + 1e-9)
        kept = torch.zeros_like(scores).index_fill(0, scores.topk(count).indices, 1.0)
        parts = kept.split([w.numel() for w in weights.values()])
        weights = {n: w * m.view_as(w) for (n, w), m in zip(weights.items(), parts)}
    found = {n: masks[n].reshape(w.shape) for n, w in zip(names[1:], list(weights.values())[1:])}
    for name, mask in found.items():
        assert torch.equal(mask, weights[f"{name}.weight"] != 0)
    conv = weights["0.weight"].permute(0, 2, 3, 1).flatten(1) != 0
    assert torch.equal(masks["0"], conv)


def test_synflow_keeps_every_layer_where_one_round_empties_one():
    torch.manual_seed(0)
    widths = (16, 100, 100, 100, 4)
    model = nn.Sequential()
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layer = nn.Linear(inputs, outputs, bias=False)  # a bias is a path of its own
        model.extend([layer, nn.ReLU()][: 2 if i < 3 else 1])
    x, y = torch.randn(64, 16), torch.arange(64) % 4
    loss = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    density = 12 / (16 * 100 + 2 * 100 * 100 + 400)
    with pytest.raises(gs.UsageError, match="would leave no weight"):
        started(model, gs.weights.SynFlow(density, rounds=1), loss)
    masks = started(model, gs.weights.SynFlow(density), loss)
    assert sum(int(mask.sum()) for mask in masks.values()) == 12
    assert all(mask.any() for mask in masks.values())


def refusal(model, method, loss, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gs.UsageError, match=match):
        started(model, method, loss)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_what_they_refuse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 4)
    grasp, synflow = gs.weights.GraSP(0.5), gs.weights.SynFlow(0.5)
    for method in (grasp, synflow):
        refusal(model, method, None, "pass loss=")
        refusal(model, method, lambda: model[2](model[0](x)).mean(), "call the model itself")
        with pytest.raises(gs.UsageError, match="first step alone"):
            method.start(step_of(1, 2, [LayerInfo("a", (2, 2), None, torch.ones(2, 2))]))
    refusal(model, grasp, lambda: model(x).detach().sum(), "no_grad")
    refusal(nn.Sequential(nn.Linear(4, 6)), grasp, None, "pass loss=")
    linear = nn.Sequential(nn.Linear(4, 6))
    refusal(linear, grasp, lambda: linear(x).sum(), "no curvature")
    unused = nn.Sequential(nn.Linear(4, 6))
    unused.other = nn.Linear(3, 3)
    unused.forward = lambda x: unused[0](x)
    refusal(unused, synflow, lambda: unused(x).sum(), "other: the loss does not depend")
    refusal(unused, grasp, lambda: unused(x).square().sum(), "other: the loss does not depend")
    dead = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    dead[1].weight.data.zero_()
    dead[0].bias.data.zero_()
    refusal(dead, synflow, lambda: dead(x).sum(), "no path")
    for bad in (lambda: gs.weights.GraSP(0.5, 0.0), lambda: gs.weights.SynFlow(0.5, 0)):
        with pytest.raises(gs.UsageError):
            bad()


class Tokens(nn.Module):
    """A tiny language model of the form that transformers has."""

    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids, labels=None):
        h = self.wte(ids)
        mixed = nn.functional.scaled_dot_product_attention(self.query(h), self.key(h), h)
        logits = self.head(h + mixed)
        loss = None if labels is None else nn.functional.cross_entropy(logits[0], labels[0])
        return SimpleNamespace(logits=logits, loss=loss)


def test_language_models_give_logits_and_have_no_ones_as_inputs():
    torch.manual_seed(0)
    model, ids = Tokens(), torch.arange(10).unsqueeze(0)

    def outside():
        return nn.functional.cross_entropy(model(ids).logits[0], ids[0])

    masks = started(model, gs.weights.GraSP(0.5), outside)
    assert sum(int(m.sum()) for m in masks.values()) == sum(m.numel() for m in masks.values()) // 2
    within = lambda: model(ids, labels=ids).loss  # noqa: E731
    refusal(model, gs.weights.GraSP(0.5), within, "outside of the model, or set temperature=1")
    started(model, gs.weights.GraSP(0.5, temperature=1.0), within)
    refusal(model, gs.weights.SynFlow(0.5), outside, "inputs are batches of real numbers")
