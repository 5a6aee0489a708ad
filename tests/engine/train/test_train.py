"""The loop of sparse training: what holds for every method, step by step."""

import copy

import pytest
import torch
from examples import TOPOLOGY
from torch import nn

import gossamer as gs

TOTAL = 24
SETS = (
    gs.Coupled(8, ("0",), ("1",), (), ("4",)),
    gs.Coupled(16, ("4",), (), (), ("6",)),
)


METHODS = {name: lambda made=x.make: made(SETS, 5) for name, x in TOPOLOGY.items()}
FINAL = {"wgsef": (2 * 36 + 4 * 128 + 48) / 2384}
"""What the sets of this model come to."""
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, 4, 4, generator=generator)
    return x, (x.mean((1, 2, 3)) * 20).long().clamp(0, 2)


def loss_of(model, step):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


def opened(model, optimizer, method, **more):
    return gs.sparse_training(
        model, optimizer, method, total_steps=TOTAL, loss=lambda: loss_of(model, 0), **more
    )


def advance(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def weights(run):
    return {x.name: x.matrix(x.weight) for x in run.layers}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_invariants_at_every_step(name, optimizer):
    model, method = build(), METHODS[name]()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    groups = isinstance(method.pattern, gs.NM)
    start, final = TOPOLOGY[name].start, FINAL.get(name, TOPOLOGY[name].final)
    with opened(model, optimizer, method) as run:
        size = sum(mask.numel() for mask in run.masks.values())
        last = round(run.density * size)
        assert last == round(start * size)
        for step in range(TOTAL):
            for key, weight in weights(run).items():
                assert not weight[~run.masks[key]].any()
            advance(model, optimizer, [step])
            kept = sum(int(mask.sum()) for mask in run.masks.values())
            assert kept <= last or name == "scl"
            if start == final:
                assert kept == round(final * size)
            if groups and (start == final or step == TOTAL - 1):
                for mask in run.masks.values():
                    shape = (-1, method.pattern.group)
                    assert (mask.reshape(shape).sum(1) == method.pattern.keep).all()
            last = kept
            for layer in run.layers:
                state = optimizer.state[layer.weight]
                for value in state.values() if not method.keeps_dense_weights else ():
                    if value.shape == layer.weight.shape:
                        assert not layer.matrix(value)[~run.masks[layer.name]].any()
        if final is None:
            assert 0 < last < size
        else:
            assert last == round(final * size)
            assert run.density == pytest.approx(final, abs=0.5 / size)
        assert run.density <= run.itop_rate <= 1
    for key, weight in weights(run).items():
        assert not weight[~run.masks[key]].any()
    before = copy.deepcopy(run.masks)
    advance(model, optimizer, [99])
    assert all(torch.equal(run.masks[key], before[key]) for key in before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [1, 10, 17])
def test_stopped_and_resumed_is_bitwise_equal(name, stop, tmp_path):
    whole = build()
    optimizer = OPTIMIZERS["adamw"](whole.parameters())
    with opened(whole, optimizer, METHODS[name](), seed=3) as run:
        advance(whole, optimizer, range(TOTAL))
    first = build()
    optimizer = OPTIMIZERS["adamw"](first.parameters())
    with opened(first, optimizer, METHODS[name](), seed=3) as part:
        advance(first, optimizer, range(stop))
        saved = copy.deepcopy(
            {"m": first.state_dict(), "o": optimizer.state_dict(), "s": part.state_dict()}
        )
    torch.save(saved, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build(seed=9)
    optimizer = OPTIMIZERS["adamw"](second.parameters())
    second.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    with opened(second, optimizer, METHODS[name](), seed=8, state=saved["s"]) as rest:
        advance(second, optimizer, range(stop, TOTAL))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert all(torch.equal(run.masks[k], rest.masks[k]) for k in run.masks)
    assert run.itop_rate == rest.itop_rate


def test_accumulation_counts_one_step_and_clipping_sees_kept_weights():
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with opened(model, optimizer, gs.weights.RigL(0.1, every=2)) as run:
        for step in range(4):
            optimizer.zero_grad()
            for part in range(3):
                loss_of(model, 3 * step + part).backward()
            run.mask_gradients()
            for layer in run.layers:
                assert not layer.matrix(layer.weight.grad)[~run.masks[layer.name]].any()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        assert run.step == 4 and run.changed > 0


def test_a_step_skipped_by_the_scaler_changes_nothing():
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with opened(model, optimizer, gs.weights.RigL(0.1, every=1)) as run:
        for bad in (True, False):
            before = {k: v.clone() for k, v in run.masks.items()}
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, 0) * (float("inf") if bad else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            run.mask_gradients()
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(before[k], v) for k, v in run.masks.items())
            assert same == bad and run.step == (0 if bad else 1)


def test_frozen_tied_and_grouped_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    model[3].weight.requires_grad_(False)
    frozen = model[3].weight.clone()
    optimizer = torch.optim.AdamW(
        [{"params": [model[0].weight], "weight_decay": 0.5}, {"params": [model[0].bias]}], lr=0.01
    )
    with gs.sparse_training(model, optimizer, gs.weights.SET(0.25, every=2), total_steps=9) as run:
        assert list(run.masks) == ["0"]
        for step in range(9):
            optimizer.zero_grad()
            model(batch(step)[0].reshape(-1, 8)).square().sum().backward()
            optimizer.step()
            assert int((model[2].weight != 0).sum()) <= 16
    assert torch.equal(model[3].weight, frozen)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_follows_the_masks(backend):
    model = build()
    compiled = torch.compile(model, backend=backend)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with gs.sparse_training(
        compiled, optimizer, gs.weights.RigL(0.2, every=3), total_steps=9
    ) as run:
        for step in range(9):
            optimizer.zero_grad()
            loss_of(compiled, step).backward()
            optimizer.step()
            x = batch(50)[0]
            model.eval()
            compiled.eval()
            torch.testing.assert_close(compiled(x), model(x))
            model.train()
        assert run.step == 9


def unharmed(model, call, error, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        call()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def enter(model, method, optimizer=None, **more):
    optimizer = optimizer or OPTIMIZERS["sgd"](model.parameters())
    with gs.sparse_training(model, optimizer, method, **{"total_steps": TOTAL, **more}):
        pass


def test_bad_input_is_one_clear_error_and_harms_nothing():
    model = build()
    for method in (
        gs.weights.StaticRandom(1e-4),
        gs.weights.GMP(1e-4),
        gs.weights.GraNet(1e-4),
        gs.weights.SNIP(0.001),
    ):
        unharmed(
            model,
            lambda m=method: enter(model, m, loss=lambda: loss_of(model, 0)),
            gs.UsageError,
            "leave",
        )
    unharmed(
        model, lambda: enter(model, gs.weights.SRSTE(gs.NM(2, 16))), gs.PatternError, "divisible"
    )
    unharmed(model, lambda: enter(model, gs.weights.SNIP(0.3)), gs.UsageError, "loss=")
    with torch.no_grad():
        unharmed(
            model,
            lambda: enter(model, gs.weights.SNIP(0.3), loss=lambda: loss_of(model, 0)),
            gs.UsageError,
            "no_grad",
        )
    other = OPTIMIZERS["sgd"](build().parameters())
    unharmed(
        model, lambda: enter(model, gs.weights.SET(0.3), other), gs.UsageError, "not the model's"
    )
    part = OPTIMIZERS["sgd"](model[0].parameters())
    unharmed(
        model,
        lambda: enter(model, gs.weights.SET(0.3), part),
        gs.UsageError,
        "not in the optimizer",
    )
    unharmed(model, lambda: enter(model, gs.weights.SET), gs.UsageError, "instance")
    unharmed(
        model,
        lambda: enter(model, gs.weights.SET(0.3), total_steps=0),
        gs.UsageError,
        "total_steps",
    )
    for bad in (lambda: gs.weights.RigL(0.1, every=0), lambda: gs.weights.SET(0.1, drop=1.5)):
        with pytest.raises(gs.UsageError):
            bad()


def test_nan_and_missing_gradients_leave_the_state_as_it_was():
    model = build()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with opened(model, optimizer, gs.weights.RigL(0.2, every=3)) as run:
        advance(model, optimizer, range(2))
        saved = copy.deepcopy(run.state_dict())
        optimizer.zero_grad()
        unharmed(model, optimizer.step, gs.UsageError, "no gradient")
        x, y = batch(0)
        model.eval()
        nn.functional.cross_entropy(model(x * float("nan")), y).backward()
        unharmed(model, optimizer.step, gs.NonFiniteError, "NaN")
        now = run.state_dict()
        assert now["step"] == saved["step"] == 2
        assert all(torch.equal(now["masks"][k], v) for k, v in saved["masks"].items())
        model.train()
        advance(model, optimizer, range(2, TOTAL))
        assert run.step == TOTAL


def test_a_closure_is_a_step_like_any_other():
    found = []
    for closed in (False, True):
        model = build()
        optimizer = OPTIMIZERS["adamw"](model.parameters())

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 1)
            loss.backward()
            return loss

        with opened(model, optimizer, gs.weights.RigL(0.2, every=2)) as run:
            for _ in range(5):
                if closed:
                    assert optimizer.step(closure).requires_grad
                else:
                    closure()
                    optimizer.step()
            assert run.step == 5
        found.append(model[4].weight.detach().clone())
    assert torch.equal(*found)


def test_optimizers_that_evaluate_twice_are_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    model = build()
    lbfgs = torch.optim.LBFGS(model.parameters())
    unharmed(model, lambda: enter(model, gs.weights.SET(0.3), lbfgs), gs.UsageError, "LBFGS")
    optimizer = Twice(model.parameters(), lr=0.1)
    with (
        opened(model, optimizer, gs.weights.SET(0.3)),
        pytest.raises(gs.UsageError, match="twice"),
    ):
        optimizer.step(lambda: loss_of(model, 0).backward())


def test_a_state_of_another_run_is_refused():
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with opened(model, optimizer, gs.weights.SET(0.2)) as run:
        state = run.state_dict()
        state["masks"].popitem()
        with pytest.raises(gs.FormatError, match="masks"):
            run.load_state_dict(state)
        with pytest.raises(gs.FormatError, match="method"):
            run.load_state_dict({**run.state_dict(), "method": "x"})
