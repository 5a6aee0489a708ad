"""A run stopped anywhere continues bit for bit, and its FLOPs are those counted by hand."""

import copy

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.engine.flops import forward_flops
from gossamer.engine.train.fit import Fit, TrainingOptions
from gossamer.engine.train.flops import expected_flops, steps_for

METHODS = {
    "dense": lambda: None,
    "snip": lambda: gs.weights.SNIP(0.5),
    "rigl": lambda: gs.weights.RigL(0.3, every=3),
    "gmp": lambda: gs.weights.GMP(0.3, every=3),
    "srste": lambda: gs.weights.SRSTE(),
}
BATCH, TOTAL = 6, 12
CONV, LINEAR = 4 * 4 * 9, 64 * 8  # weights


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2),
        nn.Flatten(), nn.Linear(64, 8),
    )  # fmt: skip


def loss(model, step):
    x = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long())


def fit(method, seed=0, optimizer="adamw"):
    recipe = TrainingOptions(TOTAL, 0.01, optimizer, 0.01, warmup=2, clip=0.5)
    return Fit(build(seed), METHODS[method](), loss, recipe, seed=3)


class Stop(Exception):
    pass


def stop_at(step):
    def report(fit):
        if fit.step == step:
            raise Stop

    return report


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_is_bitwise_equal(name, optimizer, tmp_path):
    whole = fit(name, optimizer=optimizer)
    torch.manual_seed(7)
    whole.train()
    path = tmp_path / "state.safetensors"
    part = fit(name, optimizer=optimizer)
    torch.manual_seed(7)
    with pytest.raises(Stop):
        part.train(path, {"a": 1}, save_every=2, report=stop_at(7))
    rest = fit(name, optimizer=optimizer)
    torch.manual_seed(8)
    steps = []
    rest.train(path, {"a": 1}, save_every=5, report=lambda f: steps.append(f.step))
    assert steps == list(range(7, TOTAL + 1))  # from the checkpoint of step 6
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key
    assert whole.losses == rest.losses and whole.meter.spent == rest.meter.spent
    for value in ("sad_per_update", "sad_start_to_end", "updates", "start_density"):
        assert getattr(whole.meter, value) == getattr(rest.meter, value)
    if whole.run is not None:
        assert whole.run.itop_rate == rest.run.itop_rate


def test_another_run_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "state.safetensors"
    fit("rigl").train(path, {"a": 1})
    for other, facts in ((fit("rigl"), {"a": 2}), (fit("rigl", seed=4), {"a": 1})):
        before = copy.deepcopy(other.model.state_dict())
        with pytest.raises(gs.UsageError, match="another run"):
            other.train(path, facts)
        assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())


def test_a_loss_that_is_not_a_number_stops_before_the_step(tmp_path):
    path = tmp_path / "state.safetensors"
    run = fit("rigl")
    run.loss = lambda model, step: loss(model, step) * (float("nan") if step == 5 else 1)
    with pytest.raises(gs.NonFiniteError, match="step 6"):
        run.train(path, {}, save_every=1)
    assert all(bool(torch.isfinite(v).all()) for v in run.model.state_dict().values())
    again = fit("rigl")
    again.train(path, {})
    assert again.step == TOTAL and len(again.losses) == TOTAL


def test_flops_are_those_counted_by_hand():
    model = build()
    work = forward_flops(model, lambda: loss(model, 0))
    conv, linear = BATCH * 16 * CONV, BATCH * LINEAR
    assert work == {id(model[0].weight): conv, id(model[5].weight): linear}
    dense = fit("dense")
    dense.train()
    assert dense.meter.spent == dense.meter.dense_step * TOTAL == 6 * (conv + linear) * TOTAL
    static = Fit(
        build(), gs.weights.StaticRandom(0.25, gs.Uniform()), loss, TrainingOptions(TOTAL, 0.1)
    )
    static.train()
    assert static.meter.spent == pytest.approx(0.25 * dense.meter.spent, rel=1e-12)
    rigl = Fit(
        build(), gs.weights.RigL(0.25, gs.Uniform(), every=4), loss, TrainingOptions(TOTAL, 0.1)
    )
    rigl.train()  # updates after steps 4 and 8, each with a dense gradient of the weights
    extra = 2 * 2 * 0.75 * (conv + linear)
    assert rigl.meter.spent == pytest.approx(static.meter.spent + extra, rel=1e-12)
    srste = fit("srste")
    srste.train()
    assert srste.meter.spent == pytest.approx(dense.meter.spent * (0.5 + 0.5 + 1) / 3, rel=1e-12)


@pytest.mark.parametrize("name", ["dense", "rigl", "gmp", "srste"])
def test_a_schedule_played_without_training_costs_what_training_costs(name):
    played = expected_flops(build(), METHODS[name](), TOTAL, lambda m: loss(m, 0))
    trained = fit(name)
    trained.train()
    assert played == pytest.approx(trained.meter.spent, rel=1e-12)


def test_steps_for_a_budget():
    assert steps_for(1000, 10, lambda n: 10.0 * n) == 100
    assert abs(steps_for(1000, 10, lambda n: 7.0 * n + 30 * (n // 9)) - 97) <= 1
    assert steps_for(1, 10, lambda n: 10.0 * n) == 1
