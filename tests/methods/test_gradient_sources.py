"""Every method that estimates gradients: what it leaves, what it asks, and how the loop uses it."""

import copy

import pytest
import torch
from examples import SOURCES
from torch import nn

import gossamer as gs
from gossamer.engine.flops import forward_flops
from gossamer.engine.protocols import GradientSource
from gossamer.engine.train.fit import Fit, TrainingOptions
from gossamer.engine.train.flops import expected_query_flops

TOTAL = 8


def build(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
    ).to(dtype)


def batch(step=0, dtype=torch.float64):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x.to(dtype), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss(model, step=0):
    x, y = batch(step, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x), y)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_parameters_end_as_they_were_and_queries_are_as_many_as_told(name):
    source, model = SOURCES[name](), build().eval()
    assert isinstance(source, GradientSource)
    parameters = dict(model.named_parameters())
    before = {n: p.clone() for n, p in parameters.items()}
    chosen = source.coordinates(parameters, generator())
    assert all(
        chosen[n].shape == p.shape and chosen[n].dtype == torch.bool for n, p in before.items()
    )
    again = source.coordinates(parameters, generator())
    assert all(torch.equal(chosen[n], again[n]) for n in chosen)
    other = source.coordinates(parameters, generator(1))
    assert any(not torch.equal(chosen[n], other[n]) for n in chosen)
    asked = []

    def ask():
        asked.append(all(torch.equal(p, before[n]) for n, p in parameters.items()))
        return float(loss(model))

    found = source.estimate(ask, parameters, chosen, generator())
    assert asked[0] and not any(asked[1:])
    assert len(asked) == source.queries(chosen)
    for n, p in parameters.items():
        assert torch.equal(p, before[n]) and found[n].shape == p.shape
        assert not found[n][~chosen[n]].any() and found[n][chosen[n]].any()
    same = source.estimate(ask, parameters, chosen, generator())
    assert all(torch.equal(found[n], same[n]) for n in found)


@pytest.mark.parametrize("name", SOURCES)
def test_a_step_is_that_of_one_forward_pass_with_dropout_and_batch_norm(name):
    """Against autograd under the same dropout: the estimate goes downhill, and random numbers,
    buffers and the loss are those of an ordinary step."""
    model = build()
    plain = copy.deepcopy(model)
    estimates = gs.EstimatedGradients(model, SOURCES[name](), TOTAL)
    torch.manual_seed(5)
    value = estimates.backward(lambda: loss(model))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    wanted = loss(plain)
    wanted.backward()
    assert value == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert torch.equal(state, torch.get_rng_state())
    for (n, a), (_, b) in zip(model.named_buffers(), plain.named_buffers()):
        assert torch.equal(a, b), n
    for (n, a), (_, b) in zip(model.named_parameters(), plain.named_parameters()):
        assert torch.equal(a.detach(), b.detach()), n
    ours, true = (
        torch.cat([p.grad[estimates.coordinates[n]] for n, p in m.named_parameters()])
        for m in (model, plain)
    )
    assert float(ours @ true) > 0
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    estimates.backward(lambda: loss(model, 1))
    assert any(not torch.equal(p.grad, first[n]) for n, p in model.named_parameters())


def fit(name, steps=TOTAL, **more):
    recipe = TrainingOptions(steps, 0.05, clip=1.0)
    return Fit(build(torch.float32), None, loss, recipe, seed=3, source=SOURCES[name](), **more)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", SOURCES)
def test_stopped_and_resumed_is_bitwise_equal(name, tmp_path):
    whole = fit(name)
    torch.manual_seed(7)
    whole.train()
    assert whole.losses[-1] < whole.losses[0] and whole.density == 1.0 and whole.run is None

    def stop(run):
        if run.step == 5:
            raise Stop

    part = fit(name)
    torch.manual_seed(7)
    with pytest.raises(Stop):
        part.train(tmp_path / "state", {}, save_every=3, report=stop)
    rest = fit(name)
    rest.train(tmp_path / "state", {})
    assert rest.losses == whole.losses and rest.meter.spent == whole.meter.spent
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key


@pytest.mark.parametrize("name", SOURCES)
def test_flops_are_those_of_the_forward_passes(name):
    run = fit(name)
    run.train()
    work = sum(forward_flops(run.model, lambda: loss(run.model)).values())
    assert work == 16 * (6 * 8 + 8 * 3)
    assert run.meter.spent == pytest.approx(2 * work * run.estimates.queries * TOTAL)
    played = expected_query_flops(build(torch.float32), SOURCES[name](), TOTAL, loss)
    assert played == pytest.approx(run.meter.spent)


@pytest.mark.parametrize("name", SOURCES)
def test_refusals_come_before_anything_changes(name):
    source, model = SOURCES[name](), build(torch.float32)
    with pytest.raises(gs.UsageError, match=r"0\.weight is torch\.bfloat16"):
        gs.EstimatedGradients(build(torch.bfloat16), source, TOTAL)
    with pytest.raises(gs.UsageError, match="instance of a gradient source"):
        gs.EstimatedGradients(model, type(source), TOTAL)
    with pytest.raises(gs.UsageError, match="no parameter"):
        gs.EstimatedGradients(model.requires_grad_(False), source, TOTAL)
    model = build(torch.float32)
    before = copy.deepcopy(model.state_dict())
    numbers = iter(range(100))
    with pytest.raises(gs.UsageError, match="is 1 and then 2"):
        gs.EstimatedGradients(model, source, TOTAL).backward(
            lambda: torch.tensor(float(next(numbers) + 1))
        )
    with pytest.raises(gs.NonFiniteError, match="step 1"):
        gs.EstimatedGradients(model, source, TOTAL).backward(lambda: loss(model) * float("inf"))
    recipe = TrainingOptions(TOTAL, 0.1)
    with pytest.raises(gs.UsageError, match="leave one of them out"):
        Fit(model, gs.weights.RigL(0.5), loss, recipe, source=source)
    with pytest.raises(gs.UsageError, match="leave include and exclude out"):
        Fit(model, None, loss, recipe, source=source, include=["*"])
    with pytest.raises(gs.UsageError):
        gs.prune(model, source, density=0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
