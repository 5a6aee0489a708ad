"""MaskSparsity: the pull reaches marked scales only, and the end is what is cut out."""

import pytest
import torch
from torch import nn

import gossamer as gs

SETS = (
    gs.Coupled(4, ("0",), ("1",), (), ("3",)),
    gs.Coupled(6, ("3",), ("4",), (), ("7",)),
)
X = torch.randn(32, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.1, -0.9, 0.8, 0.7]))
        model[4].weight.copy_(torch.tensor([0.2, 0.9, -0.3, 1.0, 1.1, 0.75]))
    return model


def step(model, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), X[:, 0].mean((1, 2)).gt(0).long()).backward()
    optimizer.step()


@pytest.mark.parametrize("targeted", [True, False])
def test_one_step_equals_the_formula(targeted):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = gs.weights.MaskSparsity(0.7, SETS, penalty=0.05, begin=0.0, targeted=targeted)
    before = model[4].weight.detach().clone()
    nn.functional.cross_entropy(model(X), X[:, 0].mean((1, 2)).gt(0).long()).backward()
    gradient = model[4].weight.grad.clone()
    with gs.sparse_training(model, optimizer, method, total_steps=9) as run:
        assert list(run.masks) == ["1", "4"] and run.density == 1.0
        step(model, optimizer)
    marked = torch.tensor([1.0, 0, 1, 0, 0, 0]) if targeted else torch.ones(6)
    want = before - 0.5 * (gradient + 0.05 * before.sign() * marked)
    torch.testing.assert_close(model[4].weight.detach(), want)


def test_marked_scales_come_to_nothing_and_the_network_shrinks():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = gs.weights.MaskSparsity(0.7, SETS, penalty=0.2, begin=0.0, until=0.9)
    with gs.sparse_training(model, optimizer, method, total_steps=100) as run:
        for _ in range(89):
            step(model, optimizer)
        marked = torch.cat([model[1].weight[:1], model[4].weight[[0, 2]]])
        assert run.density == 1.0 and marked.abs().max() < 0.02
        for _ in range(11):
            step(model, optimizer)
    assert run.density == 0.7
    assert model[1].weight[0] == 0 and not model[4].weight[[0, 2]].any()
    assert model[1].weight[1:].abs().min() > 0.3
    pytest.importorskip("torch_pruning")
    result = gs.remove_channels(model, X)
    assert result.removed == {"0": 1, "3": 2} and result.deviation < 1e-5


def test_by_threshold_the_density_is_what_comes_out_and_coupled_norms_go_together():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    method = gs.weights.MaskSparsity(0.7, SETS, begin=0.0, until=0.1, threshold=0.5)
    with gs.sparse_training(model, optimizer, method, total_steps=10) as run:
        step(model, optimizer)
        assert [m.flatten().int().tolist() for m in run.masks.values()] == [
            [0, 1, 1, 1],
            [0, 1, 0, 1, 1, 1],
        ]
    both = (gs.Coupled(4, ("0",), ("1", "2"), (), ("3",)),)
    pair = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    pair[1].weight.data.copy_(torch.tensor([0.0, 0.5, 1.0, 0.1]))
    pair[2].weight.data.copy_(torch.tensor([1.0, 0.2, 0.3, 0.4]))
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    with gs.sparse_training(
        pair, optimizer, gs.weights.MaskSparsity(0.5, both, begin=0.0), total_steps=4
    ) as run:
        chosen = run.state_dict()["state"]
    assert torch.equal(chosen["1:stays"], chosen["2:stays"])
    assert chosen["1:stays"].flatten().tolist() == [True, False, True, False]


PUSH = {"1": [-0.2, 0.0, 0.0, 0.15], "4": [-0.3, 0.25, 0.0, 0.0, 0.0, 0.1]}
"""Gradients that make the first scale of each norm overtake others."""


def push(model, optimizer):
    """One step with the same gradients of the scales every time."""
    optimizer.zero_grad()
    for name, gradient in PUSH.items():
        model.get_submodule(name).weight.grad = torch.tensor(gradient)
    optimizer.step()


def scales(model):
    return {name: model.get_submodule(name).weight.detach().clone() for name in PUSH}


def smallest_kept(found, count):
    """bool by norm: the `count` largest |scale| over both norms, by plain sorting."""
    places = [(float(s.abs()), name, i) for name, x in found.items() for i, s in enumerate(x)]
    kept = {(name, i) for _, name, i in sorted(places)[-count:]}
    return {n: torch.tensor([(n, i) in kept for i in range(len(x))]) for n, x in found.items()}


def test_marks_are_taken_after_the_stage_that_pulls_every_scale():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = smallest_kept(scales(model), 7)
    method = gs.weights.MaskSparsity(0.7, SETS, penalty=0.01, begin=0.3, until=0.8)
    with gs.sparse_training(model, optimizer, method, total_steps=10) as run:
        twin = scales(model)
        for step in range(1, 11):
            if step == 4:
                marks = smallest_kept(twin, 7)
            for name, x in twin.items():
                pulled = torch.ones(len(x)) if step <= 3 else (~marks[name]).float()
                x -= torch.tensor(PUSH[name]) + (step <= 8) * 0.01 * x.sign() * pulled
                if step >= 8:
                    x *= marks[name]
            push(model, optimizer)
            if step < 8:
                assert run.density == 1.0
            torch.testing.assert_close(scales(model), twin)
        assert any(not torch.equal(first[n], marks[n]) for n in marks)
        assert all(torch.equal(run.masks[n].squeeze(1), marks[n]) for n in marks)


def test_the_cut_of_the_plain_penalty_goes_by_the_scales_then():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = smallest_kept(scales(model), 7)
    method = gs.weights.MaskSparsity(0.7, SETS, penalty=0.01, until=0.5, targeted=False)
    with gs.sparse_training(model, optimizer, method, total_steps=10) as run:
        for _ in range(4):
            push(model, optimizer)
        twin = scales(model)
        want = {n: x - torch.tensor(PUSH[n]) - 0.01 * x.sign() for n, x in twin.items()}
        push(model, optimizer)
    kept = smallest_kept(want, 7)
    assert any(not torch.equal(first[n], kept[n]) for n in kept)
    assert all(torch.equal(run.masks[n].squeeze(1), kept[n]) for n in kept)


def test_marks_can_be_given_as_what_another_run_left():
    source = build()
    optimizer = torch.optim.SGD(source.parameters(), lr=1.0)
    method = gs.weights.MaskSparsity(0.7, SETS, penalty=0.01, until=0.5, targeted=False)
    with gs.sparse_training(source, optimizer, method, total_steps=10) as found:
        for _ in range(5):
            push(source, optimizer)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    again = gs.weights.MaskSparsity(None, SETS, penalty=0.03, until=0.5, masks=found.masks)
    with gs.sparse_training(model, optimizer, again, total_steps=4) as run:
        before = scales(model)
        push(model, optimizer)
        for name, x in before.items():
            gone = ~found.masks[name].squeeze(1)
            want = x - 0.5 * (torch.tensor(PUSH[name]) + 0.03 * x.sign() * gone)
            torch.testing.assert_close(scales(model)[name], want)
        push(model, optimizer)
        assert all(torch.equal(run.masks[n], found.masks[n]) for n in PUSH)
        assert run.density == 0.7


def masks(**changes):
    good = {"1": torch.tensor([False, True, True, True]), "4": torch.ones(6).bool()}
    return {name: x for name, x in {**good, **changes}.items() if x is not None}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (masks(**{"4": None}), "4: MaskSparsity needs one mask"),
        (masks(**{"7": torch.ones(3).bool()}), "7: MaskSparsity needs one mask"),
        (masks(**{"4": torch.ones(5).bool()}), "4: MaskSparsity needs one mask"),
        (masks(**{"1": torch.ones(4)}), "1: its mask is not bool"),
        (masks(**{"1": torch.zeros(4).bool()}), "keeps no channel"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_anything_changes(given, says):
    model = build()
    before = scales(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = gs.SparseRun(model, optimizer, gs.weights.MaskSparsity(None, SETS, masks=given), 4)
    with pytest.raises(gs.UsageError, match=says):
        run.start()
    assert all(torch.equal(scales(model)[n], x) for n, x in before.items())


def test_masks_of_coupled_norms_must_agree():
    both = (gs.Coupled(2, ("0",), ("1", "2"), (), ("3",)),)
    pair = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    given = {"1": torch.tensor([True, False]), "2": torch.tensor([False, True])}
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    run = gs.SparseRun(pair, optimizer, gs.weights.MaskSparsity(None, both, masks=given), 4)
    with pytest.raises(gs.UsageError, match="coupled with it"):
        run.start()


def test_arguments_that_contradict_one_another():
    for bad, says in (
        ({"density": None}, "density, a threshold or masks"),
        ({"masks": masks(), "targeted": False}, "pulls all"),
        ({"begin": 0.8, "until": 0.5}, "begin <= until"),
    ):
        with pytest.raises(gs.UsageError, match=says):
            gs.weights.MaskSparsity(**{"density": 0.5, "coupled": SETS, **bad})


def test_bad_input():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(gs.UsageError, match="no batch norm"),
        gs.sparse_training(model, optimizer, gs.weights.MaskSparsity(0.5, SETS), total_steps=2),
    ):
        pass
    normed = build()
    optimizer = torch.optim.SGD(normed.parameters(), lr=0.1)
    with (
        pytest.raises(gs.UsageError, match="exclude="),
        gs.sparse_training(
            normed, optimizer, gs.weights.MaskSparsity(0.5, SETS), total_steps=2, include=("1",)
        ),
    ):
        pass
    with pytest.raises(gs.UsageError, match="threshold"):
        gs.weights.MaskSparsity(0.5, SETS, threshold=0.0)
