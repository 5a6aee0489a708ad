"""Every method that learns masks: what holds of the run, of its end, and of resuming it."""

import copy

import pytest
import torch
from examples import LEARNED
from torch import nn

import gossamer as gs
from gossamer.engine.train.fit import Fit, TrainingOptions

TOTAL = 12


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def advance(model, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(step))
        y = (x.mean((1, 2, 3)) * 20).long().clamp(0, 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", LEARNED)
def test_the_block_leaves_plain_sparse_weights_and_nothing_else(name):
    model, method = build(), LEARNED[name]()
    optimizer, before = optimizer_of(model), copy.deepcopy(model)
    parameters, groups = list(model.parameters()), copy.deepcopy(optimizer.param_groups)
    with gs.sparse_training(model, optimizer, method, total_steps=TOTAL) as run:
        advance(model, optimizer, range(TOTAL))
        x = torch.randn(5, 4, 4, 4)
        model.eval()
        inside = model(x)
        supports = run.supports
    assert torch.equal(inside, model(x)), "evaluation inside is that of what remains"
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(p is q and p.requires_grad for p, q in zip(model.parameters(), parameters))
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(groups[0]["params"])]
    assert set(optimizer.state) <= set(parameters)
    assert run.density == pytest.approx(method.pattern.density)
    for layer in run.layers:
        weight, mask = layer.matrix(layer.weight), supports[layer.name].mask
        assert torch.equal(mask, run.supports[layer.name].mask) and not weight[~mask].any()
        group = (-1, method.pattern.group)
        assert (mask.reshape(group).sum(1) == method.pattern.keep).all()
    if method.freezes:
        for old, new in zip(before.parameters(), model.parameters()):
            assert torch.equal(torch.where(new != 0, old, 0), new)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("stop", [1, 7])
def test_stopped_and_resumed_is_bitwise_equal(name, stop, tmp_path):
    whole = build()
    optimizer = optimizer_of(whole)
    with gs.sparse_training(whole, optimizer, LEARNED[name](), total_steps=TOTAL, seed=3):
        advance(whole, optimizer, range(TOTAL))
    first = build()
    optimizer = optimizer_of(first)
    with gs.sparse_training(first, optimizer, LEARNED[name](), total_steps=TOTAL, seed=3) as run:
        advance(first, optimizer, range(stop))
        saved = {"m": first.state_dict(), "o": optimizer.state_dict(), "s": run.state_dict()}
        torch.save(saved, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build(seed=9)
    optimizer = optimizer_of(second)
    with gs.sparse_training(
        second, optimizer, LEARNED[name](), total_steps=TOTAL, seed=8, state=saved["s"]
    ):
        second.load_state_dict(saved["m"])
        optimizer.load_state_dict(saved["o"])
        advance(second, optimizer, range(stop, TOTAL))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("name", LEARNED)
def test_a_state_without_the_models_own_is_noticed(name):
    model = build()
    optimizer = optimizer_of(model)
    with gs.sparse_training(model, optimizer, LEARNED[name](), total_steps=TOTAL) as run:
        advance(model, optimizer, range(3))
        state = run.state_dict()
    other = build(seed=1)
    optimizer = optimizer_of(other)
    with (
        pytest.raises(gs.UsageError, match="load the model's state dict inside"),
        gs.sparse_training(other, optimizer, LEARNED[name](), total_steps=TOTAL, state=state),
    ):
        advance(other, optimizer, [3])
    with (
        pytest.raises(gs.FormatError, match="total_steps"),
        gs.sparse_training(other, optimizer, LEARNED[name](), total_steps=99, state=state),
    ):
        pass
    assert list(other.state_dict()) == list(build().state_dict())


@pytest.mark.parametrize("name", LEARNED)
def test_an_error_inside_leaves_the_dense_weights(name):
    model = build()
    optimizer, before = optimizer_of(model), copy.deepcopy(model.state_dict())
    with (
        pytest.raises(KeyError),
        gs.sparse_training(model, optimizer, LEARNED[name](), total_steps=TOTAL),
    ):
        raise KeyError
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert len(optimizer.param_groups) == 1 and list(before) == list(model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", LEARNED)
def test_refusals_come_before_anything_changes(name):
    model, method = build(), LEARNED[name]()
    optimizer = optimizer_of(model)

    def refuse(match, given=model, **more):
        with (
            pytest.raises(gs.UsageError, match=match),
            gs.sparse_training(given, optimizer, method, **{"total_steps": TOTAL, **more}),
        ):
            pass
        assert list(model.state_dict()) == list(build().state_dict())

    refuse("total_steps", total_steps=0)
    refuse("wrapped", nn.DataParallel(model))
    with pytest.raises(gs.UsageError, match="Fit follows topology methods"):
        Fit(model, method, lambda model, step: 0, TrainingOptions(steps=1, lr=0.1))
    refuse("neither loss=", loss=lambda: 0)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    refuse("tied to", tied) if method.freezes else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if method.rate is not None:
        refuse("inside the block")
    del schedule


@pytest.mark.parametrize("name", LEARNED)
def test_what_no_step_did_is_noticed(name):
    model = build()
    optimizer = optimizer_of(model)
    with (
        pytest.raises(gs.UsageError, match="not in a step of AdamW"),
        gs.sparse_training(model, optimizer, LEARNED[name](), total_steps=TOTAL) as run,
        torch.no_grad(),
    ):
        run.layers[0].weight.add_(1)
    with (
        pytest.raises(gs.NonFiniteError, match="step is not taken"),
        gs.sparse_training(model, optimizer, LEARNED[name](), total_steps=TOTAL) as run,
    ):
        learns = optimizer.param_groups[-1]["params"][0]
        learns.grad = torch.full_like(learns, float("nan"))
        optimizer.step()
    if run.method.freezes:
        with (
            pytest.raises(gs.UsageError, match=r"1\.weight: was made trainable"),
            gs.sparse_training(model, optimizer, LEARNED[name](), total_steps=TOTAL),
        ):
            model[1].weight.requires_grad_(True)
            optimizer.step()


@pytest.mark.parametrize("name", LEARNED)
def test_a_schedule_made_inside_moves_all_groups(name):
    model = build()
    optimizer = optimizer_of(model)
    with gs.sparse_training(model, optimizer, LEARNED[name](), total_steps=TOTAL) as run:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [0.01] + [run.method.rate] * (run.method.rate is not None)
        advance(model, optimizer, [0])
        schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == [x / 2 for x in rates]
