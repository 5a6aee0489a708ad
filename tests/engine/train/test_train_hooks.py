"""What a topology method may do around a step, beside choosing supports."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.methods.weights.topology import StaticSupport

LEFT = torch.arange(12) < 6


@dataclass(frozen=True)
class Half(StaticSupport):
    """Keeps the first eight inputs, and does not let the first six move."""

    card: ClassVar[gs.Card] = gs.weights.SET.card

    def start(self, step):
        return {x.name: (torch.arange(12) < 8).expand_as(x.weight).clone() for x in step.layers}

    def frozen(self, step):
        assert step.number > 0
        return {x.name: LEFT.expand_as(x.weight) for x in step.layers if x.name == "0"}


@dataclass(frozen=True)
class Halving(StaticSupport):
    """Halves every weight after a step, kept or behind the support."""

    keeps_dense_weights: ClassVar[bool] = True
    card: ClassVar[gs.Card] = gs.weights.SET.card

    def start(self, step):
        return {x.name: LEFT.expand_as(x.weight).clone() for x in step.layers}

    def edit_weights(self, step):
        return {x.name: 0.5 * x.weight for x in step.layers}


@dataclass(frozen=True)
class SummingGradients(StaticSupport):
    """Every fourth step keeps what had the largest sums of gradients over the four steps."""

    card: ClassVar[gs.Card] = gs.weights.SET.card

    def start(self, step):
        return {x.name: LEFT.expand_as(x.weight).clone() for x in step.layers}

    def first_state(self, step):
        return {x.name: {"sum": torch.zeros_like(x.weight)} for x in step.layers}

    def next_state(self, step, layer, gradient):
        begins = (step.number - 1) % 4 == 0
        return {"sum": gradient.clone() if begins else layer.state["sum"] + gradient}

    def due(self, step, total):
        return step % 4 == 0

    def update(self, step):
        sums = {x.name: x.state["sum"].abs() for x in step.layers}
        return [{n: gs.select(x, gs.Unstructured(), 0.5).mask for n, x in sums.items()}]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


def step(model, optimizer, seed):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_weights_keep_every_bit_and_others_train(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4))
    before = [layer.weight.detach().clone() for layer in model]
    optimizer = OPTIMIZERS[kind](model.parameters())
    with gs.sparse_training(model, optimizer, Half(), total_steps=5, include=("*",)):
        for seed in range(5):
            step(model, optimizer, seed)
    assert torch.equal(model[0].weight[:, LEFT], before[0][:, LEFT])
    assert (model[0].weight[:, 6:8] != before[0][:, 6:8]).all()
    assert not model[0].weight[:, 8:].any()
    assert (model[1].weight[:, :8] != before[1][:, :8]).all()


def test_edits_reach_dense_weights_behind_the_support():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 4))
    want = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gs.sparse_training(model, optimizer, Halving(), total_steps=3, include=("*",)) as run:
        for seed in range(3):
            step(model, optimizer, seed)
            want = 0.5 * want
            assert torch.equal(run.state_dict()["hidden"]["0"], want)
            assert torch.equal(model[0].weight.detach(), want * LEFT)


def test_a_method_may_sum_gradients_over_a_window():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    weight, seen = model[0].weight, []
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = SummingGradients()
    with gs.sparse_training(model, optimizer, method, total_steps=8, include=("*",)) as run:
        for seed in range(8):
            step(model, optimizer, seed)
            if seed % 4 == 3:
                sums = sum(seen[-4:]).abs()
                assert run.masks["0"].sum() == 72
                assert sums[run.masks["0"]].min() >= sums[~run.masks["0"]].max()
                assert not torch.equal(run.masks["0"], LEFT.expand_as(sums))
