"""Training where only kept weights exist, against the masked loop on the same topology."""

import copy

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.engine.train.compressed import largest_gradients
from gossamer.nn import SparseConv2d, SparseLinear, to_dense

TOTAL = 21
METHODS = {
    "static": lambda: gs.weights.StaticRandom(0.2),
    "set": lambda: gs.weights.SET(0.2, every=5),
    "rigl": lambda: gs.weights.RigL(0.2, every=5),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 24), nn.ReLU(), nn.Linear(24, 3),
    )  # fmt: skip


def loss_of(model, step):
    x = torch.randn(16, 6, 4, 4, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(x), (x.mean((1, 2, 3)) * 20).long().clamp(0, 2))


def advance(model, optimizer, steps, micro=1):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for part in range(micro):
            loss = loss_of(model, step + 100 * part) / micro
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sparse(method):
    return gs.sparse_layers(build(), method, include=("6",), seed=3)


def kept(model):
    return {
        name: module.positions
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear | SparseConv2d)
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["static", "rigl"])
def test_equals_the_masked_loop_on_the_same_topology(name, optimizer, monkeypatch):
    method = METHODS[name]()
    ours, masked = sparse(method), build()
    masks, start = {}, kept(ours)
    for layer, positions in start.items():
        weight = masked.get_submodule(layer).weight
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        masks[layer] = mask.index_fill(0, positions, True).reshape(weight.shape[:2])
    monkeypatch.setattr(type(method), "start", lambda *_: masks)
    optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in (ours, masked)]
    with gs.true_sparse_training(ours, optimizers[0], method, total_steps=TOTAL) as run:
        found = advance(ours, optimizers[0], range(TOTAL), micro=2)
    with gs.sparse_training(
        masked, optimizers[1], method, total_steps=TOTAL, include=("6",)
    ) as twin:
        wanted = advance(masked, optimizers[1], range(TOTAL), micro=2)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    for layer, positions in kept(ours).items():
        mask = twin.supports[layer].mask.reshape(-1)
        assert torch.equal(positions, mask.nonzero().reshape(-1)), layer
    assert run.changed == twin.changed and run.density == twin.density
    moved = any(not torch.equal(positions, start[layer]) for layer, positions in kept(ours).items())
    assert moved == (name == "rigl")
    for one, other in zip(to_dense(ours).parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_set_keeps_its_count_drops_the_smallest_and_resets_state(optimizer):
    model = sparse(METHODS["set"]())
    optim = OPTIMIZERS[optimizer](model.parameters())
    with gs.true_sparse_training(model, optim, METHODS["set"](), total_steps=TOTAL) as run:
        advance(model, optim, range(4))
        before = {name: layer.to_matrix() for name, layer in run.layers.items()}
        counts = {name: layer.values.numel() for name, layer in run.layers.items()}
        values = {name: layer.values.detach().clone() for name, layer in run.layers.items()}
        run.after_step()  # the update of step 5, with no step of the optimizer in between
        for name, layer in run.layers.items():
            assert layer.values.numel() == counts[name]
            stay = run.method.survivors(values[name], 5, TOTAL)
            matrix = layer.to_matrix()
            assert int((matrix != 0).sum()) == int(stay.sum())
            assert torch.equal(matrix[matrix != 0], before[name][matrix != 0])
            assert torch.equal(matrix[matrix != 0], values[name][stay])
            new = layer.values.detach() == 0
            for state in optim.state[layer.values].values():
                if state.shape == new.shape:
                    assert not state[new].any() and state[~new].any()
        assert run.changed == 2 * sum(
            int((~run.method.survivors(v, 5, TOTAL)).sum()) for v in values.values()
        )
        advance(model, optim, range(5, TOTAL))


def test_set_returns_what_was_dropped_only_where_nothing_else_is_free():
    layer = SparseLinear.random(10, 10, 0.95)
    model, method = nn.Sequential(layer), gs.weights.SET(0.95, every=1, drop=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = layer.positions
    with gs.true_sparse_training(model, optimizer, method, total_steps=3):
        model(torch.randn(4, 10)).square().sum().backward()
        optimizer.step()
    assert layer.values.numel() == 95
    free = torch.isin(torch.arange(100), old, invert=True)
    assert bool(torch.isin(free.nonzero().reshape(-1), layer.positions).all())


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_bitwise_equal(name):
    method = METHODS[name]()
    whole, first = sparse(method), sparse(method)
    optim = OPTIMIZERS["adamw"](whole.parameters())
    with gs.true_sparse_training(whole, optim, method, total_steps=TOTAL):
        advance(whole, optim, range(TOTAL))
    optim = OPTIMIZERS["adamw"](first.parameters())
    with gs.true_sparse_training(first, optim, method, total_steps=TOTAL) as run:
        advance(first, optim, range(8))
    saved = copy.deepcopy((first.state_dict(), optim.state_dict(), run.state_dict()))
    second = gs.sparse_layers(build(1), method, include=("6",), seed=9)
    optim = OPTIMIZERS["adamw"](second.parameters())
    second.load_state_dict(saved[0])
    optim.load_state_dict(saved[1])
    with gs.true_sparse_training(second, optim, method, total_steps=TOTAL, state=saved[2]):
        advance(second, optim, range(8, TOTAL))
    for ours, other in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, other)


def test_no_dense_tensor_is_ever_made(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    import gossamer.engine.train.compressed as module

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "expand" not in str(func):
                self.most = max(self.most, result.untyped_storage().nbytes() // 4)
            return result

    monkeypatch.setattr(module, "_BLOCK", 1 << 17)
    method = gs.weights.RigL(0.02, every=1)
    layer = SparseLinear.random(2000, 1500, 0.02, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    optimizer = torch.optim.AdamW(model.parameters())
    before = layer.positions
    with Largest() as watch, gs.true_sparse_training(model, optimizer, method, total_steps=10):
        model(torch.randn(8, 2000)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(layer.positions, before)
    assert watch.most < 2000 * 1500 / 8  # blocks of rows of the gradient, and the scratch


def test_the_largest_gradients_of_row_blocks_are_those_of_the_whole(monkeypatch):
    import gossamer.engine.train.compressed as module

    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(n, 30, generator=generator), torch.randn(n, 20, generator=generator))
        for n in (4, 7)
    ]
    pairs[0][1][:, :9] = pairs[1][1][:, :9] = 0  # ties: rows without gradient
    whole = sum(dy.t() @ x for x, dy in pairs).abs().reshape(-1)
    kept_ones = torch.arange(0, 600, 3)
    whole[kept_ones] = -1
    order = whole.sort(descending=True, stable=True).indices
    for block in (30, 100, 10_000):
        monkeypatch.setattr(module, "_BLOCK", block)
        for count in (0, 1, 17, 250, 400):
            found = largest_gradients(pairs, (20, 30), count, kept_ones)
            assert sorted(found.tolist()) == sorted(order[:count].tolist())


def test_bad_input():
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with (
        pytest.raises(gs.UsageError, match="no sparse layer"),
        gs.true_sparse_training(model, optimizer, gs.weights.SET(0.2), total_steps=3),
    ):
        pass
    with pytest.raises(gs.UsageError, match="StaticRandom, SET and RigL"):
        gs.sparse_layers(model, gs.weights.GMP(0.2))
    before = list(model.children())
    with pytest.raises(gs.UsageError, match="leaves no weight"):
        gs.sparse_layers(model, gs.weights.SET(0.001, gs.Uniform()))
    wide = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 3, 3))
    with pytest.raises(gs.UsageError, match=r"1: only Linear and 1x1"):
        gs.sparse_layers(wide, gs.weights.SET(0.5))
    assert list(model.children()) == before and type(wide[0]) is nn.Linear
    gs.sparse_layers(model, gs.weights.RigL(0.5))
    with (
        pytest.raises(gs.UsageError, match="not in the optimizer"),
        gs.true_sparse_training(model, optimizer, gs.weights.RigL(0.5), total_steps=3),
    ):
        pass


def test_missing_or_wrong_gradients_take_no_step():
    method = gs.weights.RigL(0.3, every=2)
    model = sparse(method)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with gs.true_sparse_training(model, optimizer, method, total_steps=9) as run:
        advance(model, optimizer, [0])
        saved = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        with pytest.raises(gs.UsageError, match="has no gradient"):
            optimizer.step()
        (loss_of(model, 0) * float("nan")).backward()
        with pytest.raises(gs.NonFiniteError, match="not taken"):
            optimizer.step()
        assert run.step == 1
        for name, tensor in model.state_dict().items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(tensor, saved[name])
        advance(model, optimizer, [1])
        assert run.step == 2 and run.changed > 0
        with pytest.raises(gs.FormatError, match="total_steps"):
            run.load_state_dict({**run.state_dict(), "total_steps": 8})
