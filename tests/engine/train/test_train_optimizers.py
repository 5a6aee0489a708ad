"""Optimizers that wrap another, step in two halves, or call the step of their base class."""

import copy

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.engine.train.optimizers import follow

METHODS = {
    "rigl": lambda: gs.weights.RigL(0.2, every=2),
    "gmp": lambda: gs.weights.GMP(0.2, every=2),
    "srste": lambda: gs.weights.SRSTE(decay=0.01),
}
DENSE = ("gmp", "srste")
"""Have dense weights behind the support."""


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def loss_of(model, step):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    return (model(x) - 1).square().mean()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def backward(model, optimizer, step):
    optimizer.zero_grad()
    loss_of(model, step).backward()


def opened(model, optimizer, method, **more):
    return gs.sparse_training(model, optimizer, method, **{"total_steps": 12, "seed": 3, **more})


def assert_inside(run):
    for layer in run.layers:
        assert not layer.matrix(layer.weight)[~run.masks[layer.name]].any(), layer.name


class Bare:
    """Passes steps on; knows nothing of torch's base class."""

    def __init__(self, inner, name="inner"):
        setattr(self, name, inner)
        self.zero_grad, self.param_groups = inner.zero_grad, inner.param_groups

    def step(self):
        inner = next(x for x in vars(self).values() if isinstance(x, torch.optim.Optimizer))
        inner.step()


class Uninitialised(torch.optim.Optimizer):
    """accelerate's way: a subclass without the base's `__init__`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)


class Override(torch.optim.SGD):
    """Calls its base class, whose step torch hooks too, and decays once more."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1.0)
        return loss


def accelerated(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(sgd(model))


WRAPPED = {
    "bare": lambda m: Bare(sgd(m)),
    "any name": lambda m: Bare(sgd(m), "_whatever"),
    "uninitialised": lambda m: Uninitialised(sgd(m)),
    "nested": lambda m: Bare(Uninitialised(sgd(m)), "_optimizer"),
    "accelerate": accelerated,
    "override": lambda m: Override(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_optimizer_trains_as_the_one_inside(name, method):
    found = []
    for make in (sgd, WRAPPED[name]):
        model = build()
        optimizer = make(model)
        with opened(model, optimizer, METHODS[method]()) as run:
            for step in range(12):
                backward(model, optimizer, step)
                optimizer.step()
                assert_inside(run)
        assert run.step == 12 and isinstance(run.optimizer, torch.optim.SGD)
        found.append((run.masks, model.state_dict()))
    (masks, weights), (other, more) = found
    assert all(torch.equal(masks[k], other[k]) for k in masks)
    assert all(torch.equal(weights[k], more[k]) for k in weights)


class Lookahead:
    """Every second step back towards slow weights."""

    def __init__(self, base):
        self.base, self.param_groups, self.taken = base, base.param_groups, 0
        self.state = {}
        for p in self.params():
            self.state[p] = {"slow": p.detach().clone()}

    def params(self):
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self):
        self.base.zero_grad()

    @torch.no_grad()
    def step(self):
        self.base.step()
        self.taken += 1
        for p in self.params() if self.taken % 2 == 0 else ():
            slow = self.state[p]["slow"]
            slow.lerp_(p, 0.5)
            p.copy_(slow)


@pytest.mark.parametrize("method", METHODS)
def test_lookahead_keeps_to_the_support_and_is_not_undone(method):
    model = build()
    optimizer = Lookahead(sgd(model))
    with opened(model, optimizer, METHODS[method]()) as run:
        for step in range(12):
            backward(model, optimizer, step)
            optimizer.step()
            assert_inside(run)
            for layer in run.layers if step % 2 else ():  # the kept weights are the slow ones
                mask = run.masks[layer.name]
                slow = layer.matrix(optimizer.state[layer.weight]["slow"])
                assert torch.equal(layer.matrix(layer.weight)[mask], slow[mask])
    assert run.step == 12


class SAM(torch.optim.Optimizer):
    """As published: the weights are kept aside, or subtracted from again."""

    aside = True

    def __init__(self, params, **more):
        super().__init__(params, {"rho": 0.5, **more})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **more)
        self.param_groups = self.base_optimizer.param_groups

    def params(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.stack([p.grad.norm() for p in self.params()]).norm()
        for p in self.params():
            self.state[p]["old_p"] = p.data.clone()
            self.state[p]["e_w"] = p.grad * (0.5 / norm)
            p.add_(self.state[p]["e_w"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in self.params():
            if self.aside:
                p.data = self.state[p]["old_p"]
            else:
                p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Subtracting(SAM):
    aside = False


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("kind", [SAM, Subtracting])
@pytest.mark.parametrize("method", METHODS)
def test_both_gradients_of_sam_are_those_of_the_sparse_network(method, kind, closed):
    model = build()
    optimizer = kind(model.parameters(), lr=0.05, momentum=0.9)
    with opened(model, optimizer, METHODS[method]()) as run:
        for step in range(12):
            backward(model, optimizer, step)

            def second(step=step):
                assert_inside(run)
                moved = any(
                    not torch.equal(p, optimizer.state[p]["old_p"]) for p in model.parameters()
                )
                assert moved
                optimizer.zero_grad()
                loss_of(model, step).backward()

            if closed:
                optimizer.step(second)
            else:
                optimizer.first_step(zero_grad=True)
                second()
                optimizer.second_step(zero_grad=True)
            assert_inside(run)
    assert run.step == 12
    assert "first_step" not in vars(optimizer) and "step" not in vars(optimizer)


def test_sam_equals_its_definition_on_a_fixed_support():
    """By hand: the gradient at w + e with e inside the mask, then a masked step from w."""
    model = build()
    optimizer = SAM(model.parameters(), lr=0.05)
    with opened(model, optimizer, gs.weights.StaticRandom(0.3)) as run:
        twin = copy.deepcopy(model)
        backward(model, optimizer, 0)
        optimizer.first_step(zero_grad=True)
        loss_of(model, 0).backward()
        optimizer.second_step()
    masks = {f"{n}.weight": m for n, m in run.masks.items()}
    named = dict(twin.named_parameters())

    def gradients():
        found = torch.autograd.grad(loss_of(twin, 0), list(named.values()))
        return {n: g * masks.get(n, 1) for n, g in zip(named, found, strict=True)}

    first = gradients()
    norm = torch.stack([g.norm() for g in first.values()]).norm()
    before = copy.deepcopy(twin.state_dict())
    with torch.no_grad():
        for name, p in named.items():
            p.add_(first[name] * (0.5 / norm))
    second = gradients()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] - 0.05 * second[name])


class Own(torch.optim.SGD):
    """Steps by a method of its own, which no hook sees."""

    @torch.no_grad()
    def advance(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("method", ["rigl", "gmp"])
def test_an_update_that_no_hook_sees_is_an_error_of_the_block(method):
    model = build()
    optimizer = Own(model.parameters(), lr=0.1)
    with (
        pytest.raises(gs.UsageError, match=r"Own.*step"),
        opened(model, optimizer, METHODS[method]()) as run,
    ):
        backward(model, optimizer, 0)
        optimizer.advance()
        with pytest.raises(gs.UsageError, match="Own"):
            _ = run.density
        with pytest.raises(gs.UsageError, match="Own"):
            run.state_dict()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_such_an_update_between_steps_is_an_error_of_the_next():
    model = build()
    optimizer = Own(model.parameters(), lr=0.1)
    with opened(model, optimizer, METHODS["rigl"]()) as run:
        backward(model, optimizer, 0)
        optimizer.step()
        backward(model, optimizer, 1)
        for p in model.parameters():
            p.data -= 0.1 * p.grad
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(gs.UsageError, match=r"0: \d+ weights outside the support"):
            optimizer.step()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert run.step == 1
        assert 0 < run.apply_to(model) < 1
        optimizer.step()
        assert run.step == 2


def test_an_exception_inside_the_block_is_not_masked():
    model = build()
    optimizer = sgd(model)
    with (
        pytest.raises(KeyError, match="mine"),
        opened(model, optimizer, METHODS["rigl"]()),
    ):
        nn.init.ones_(model[0].weight)
        raise KeyError("mine")


def test_what_cannot_be_followed_is_refused_before_anything_changes():
    model = build()
    before = copy.deepcopy(model.state_dict())

    class Nothing:
        def step(self):
            pass

    halves = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    rest = torch.optim.AdamW(model[4].parameters())
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for given, match in [
        (Nothing(), "Nothing neither is"),
        (model, "Sequential neither is"),
        (halves, "list shares the layers"),
        (Bare(halves[0]), "2: its weight is not in the optimizer"),
        (Bare(torch.optim.SGD(masters, lr=0.1)), "master copies"),
        (Bare(torch.optim.LBFGS(model.parameters())), "LBFGS"),
    ]:
        with pytest.raises(gs.UsageError, match=match), opened(model, given, gs.weights.SET(0.2)):
            pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # of several optimizers the one that holds all masked layers is followed
    body = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    with opened(model, {"body": body, "head": rest}, gs.weights.SET(0.2), exclude=("4",)) as run:
        assert run.optimizer is body


def test_a_wrapper_that_skips_steps_counts_those_taken():
    class Every(Uninitialised):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            if self.calls % 3 == 0:
                super().step(closure)

    model = build()
    optimizer = Every(sgd(model))
    with opened(model, optimizer, METHODS["rigl"]()) as run:
        for step in range(6):
            loss_of(model, step).backward()
            optimizer.step()
        assert run.step == 2


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("name", ["plain", "bare sgd", "uninitialised"])
@pytest.mark.filterwarnings("error")
def test_schedulers_that_patch_step_go_on_working(name, when):
    model = build()
    inner = sgd(model)
    optimizer = {"plain": inner, "bare sgd": inner, "uninitialised": Uninitialised(inner)}[name]
    make = torch.optim.lr_scheduler.StepLR
    schedule = make(optimizer, 2) if when == "before" else None
    with opened(model, optimizer, METHODS["rigl"]()) as run:
        schedule = schedule or make(optimizer, 2)
        for step in range(4):
            backward(model, optimizer, step)
            optimizer.step()
            schedule.step()
        assert run.step == 4
    assert inner.param_groups[0]["lr"] == pytest.approx(0.0005)
    backward(model, optimizer, 9)
    optimizer.step()
    assert run.step == 4


def test_true_sparse_training_follows_and_checks_too():
    method = gs.weights.RigL(0.3, every=2)
    found = []
    for make in (sgd, lambda m: Bare(sgd(m)), lambda m: Override(m.parameters(), lr=0.05,
                                                                momentum=0.9, weight_decay=0.01)):  # fmt: skip
        model = gs.sparse_layers(build(), method)
        optimizer = make(model)
        with gs.true_sparse_training(model, optimizer, method, total_steps=12) as run:
            for step in range(12):
                backward(model, optimizer, step)
                optimizer.step()
        assert run.step == 12
        found.append([layer.to_matrix() for layer in run.layers.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    model = gs.sparse_layers(build(), method)
    optimizer = Own(model.parameters(), lr=0.1)
    with (
        pytest.raises(gs.UsageError, match="no step of Own"),
        gs.true_sparse_training(model, optimizer, method, total_steps=12),
    ):
        backward(model, optimizer, 0)
        optimizer.advance()
    model = gs.sparse_layers(build(), method)
    optimizer = SAM(model.parameters(), lr=0.05)
    with gs.true_sparse_training(model, optimizer, method, total_steps=12) as run:
        for step in range(8):
            backward(model, optimizer, step)
            optimizer.first_step(zero_grad=True)
            loss_of(model, step).backward()
            optimizer.second_step()
        assert run.step == 8


def test_the_innermost_holder_is_found_and_others_are_left():
    model, other = build(), build()
    inner = sgd(model)
    outer = Uninitialised(inner)
    outer.teacher = sgd(other)  # holds none of the weights
    outer.self = outer
    found = follow(outer, list(model.parameters()))
    assert found.optimizer is inner and found.wrappers == (outer,) and found.name == "Uninitialised"
