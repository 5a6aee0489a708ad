"""Every recipe: supports that only shrink, the asked density, determinism, and resuming."""

import copy

import pytest
import torch
from examples import RECIPES
from torch import nn

import gossamer as gs

TOTAL, SIZE, FINAL = 6, 16 * 24 + 24 * 12, 0.25


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3)
    )


class Train:
    """A training of a few steps that keeps what each one ended with, and may be stopped."""

    def __init__(self, stop_at=None):
        self.made, self.stop_at = [], stop_at

    def __call__(self, model, method, part):
        if len(self.made) == self.stop_at:
            raise KeyboardInterrupt
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        with gs.sparse_training(model, optimizer, method, total_steps=TOTAL, exclude=["4"]):
            for step in range(part.first, part.first + part.steps(TOTAL)):
                seed = 1000 * part.member + step
                x = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
                optimizer.step()
        self.made.append((part.index, copy.deepcopy(model.state_dict())))


def run(name, stop_at=None, **more):
    model, train = build(), Train(stop_at)
    result = gs.train_rounds(model, RECIPES[name](), train, exclude=["4"], **more)
    return model, train, result


def kept(state):
    return {name: state[name] != 0 for name in ("0.weight", "2.weight")}


@pytest.mark.parametrize("name", RECIPES)
def test_supports_shrink_to_the_density_and_hold(name):
    model, train, result = run(name)
    method = RECIPES[name]()
    assert result.densities[0] == 1.0 and len(result.densities) == method.rounds + 1
    assert list(result.densities) == sorted(result.densities, reverse=True)
    assert result.densities[-1] == pytest.approx(FINAL, abs=1 / SIZE)
    assert set(result.supports) == {"0", "2"} and bool((model[4].weight != 0).all())
    for layer, support in result.supports.items():
        assert not model.get_submodule(layer).weight[~support.mask].any()
    by_round = {}
    for index, state in train.made:
        by_round.setdefault(index, []).append(kept(state))
    assert sorted(by_round) == list(range(method.rounds + 1))
    for index in range(2, method.rounds + 1):  # round 0 is dense
        for new in by_round[index]:
            for layer, mask in new.items():
                before = torch.stack([old[layer] for old in by_round[index - 1]]).any(0)
                assert not (mask & ~before).any()


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_stops_goes_on_to_the_same_weights(name, tmp_path):
    whole, train, _ = run(name)
    parts = len(train.made)
    for stop_at in {1, parts - 1}:
        folder = tmp_path / str(stop_at)
        with pytest.raises(KeyboardInterrupt):
            run(name, stop_at, checkpoint=folder)
        model, rest, result = run(name, checkpoint=folder)
        assert len(rest.made) == parts - stop_at
        assert result.densities[-1] == pytest.approx(FINAL, abs=1 / SIZE)
        for one, other in zip(model.state_dict().values(), whole.state_dict().values()):
            assert torch.equal(one, other)
