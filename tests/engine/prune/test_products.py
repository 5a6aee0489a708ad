"""What multiplies a weight is seen wherever it is multiplied, and as it lies."""

import pytest
import torch
from torch import nn

from gossamer.core.matrix import Weight
from gossamer.engine import hooks
from gossamer.engine.prune.calibrate import Calibrator
from gossamer.engine.prune.products import observe_products, unfused
from gossamer.models import choose_weights, find_weights


def seen_by(weights, run):
    rows, ways = {}, {}

    def note(name, x, flipped):
        rows.setdefault(name, []).append(x.clone())
        ways.setdefault(name, set()).add(flipped)

    with torch.no_grad(), observe_products(weights, note):
        run()
    return {name: torch.cat(parts) for name, parts in rows.items()}, ways


class Bare(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
FLAT = X.reshape(-1, 4)
USES = {
    "linear": lambda w: nn.functional.linear(X, w, torch.ones(3)),
    "one vector": lambda w: nn.functional.linear(FLAT[0], w),
    "by hand": lambda w: w @ X.transpose(1, 2),
    "matrix-vector": lambda w: w @ FLAT[0],
    "batched": lambda w: torch.bmm(X, w.t().expand(2, 4, 3)),
    "einsum": lambda w: torch.einsum("btd,od->bto", X, w),
}


@pytest.mark.parametrize("use", USES)
def test_rows_of_every_product(use):
    module = Bare(3, 4)
    rows, ways = seen_by({"w": Weight(module, "w")}, lambda: USES[use](module.w))
    wanted = FLAT[:1] if use in ("one vector", "matrix-vector") else FLAT
    assert ways == {"w": {False}}
    torch.testing.assert_close(rows["w"], wanted)


def test_copies_and_other_memory_are_not_taken_for_the_weight():
    module, other = Bare(3, 4), torch.randn(3, 4)
    rows, _ = seen_by(
        {"w": Weight(module, "w")},
        lambda: (X @ module.w.clone().t(), X @ other.t(), X[..., :3] @ module.w[:, :3].t()),
    )
    assert not rows


def test_weights_that_lie_as_in_out():
    module = Bare(4, 3)
    rows, ways = seen_by({"w": Weight(module, "w")}, lambda: X @ module.w)
    assert ways == {"w": {True}} and torch.equal(rows["w"], FLAT)


def test_rows_of_one_parameter_are_told_apart():
    module = Bare(6, 4)
    weights = {name: Weight(module, "w", slice(at, at + 2)) for name, at in zip("qkv", (0, 2, 4))}
    other = torch.randn(3, 4)
    rows, _ = seen_by(weights, lambda: (other @ module.w[:2].t(), X @ module.w[2:].t()))
    assert torch.equal(rows["q"], other)
    assert torch.equal(rows["k"], FLAT) and torch.equal(rows["v"], FLAT)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_a_loop_in_a_batch_and_grouped(transposed):
    module = Bare(3, 4, 8) if transposed else Bare(3, 8, 4)
    weights = {str(i): Weight(module, "w", i, transposed) for i in range(3)}
    stack = module.w if transposed else module.w.transpose(1, 2)
    parts = [torch.randn(n, 4) for n in (2, 5, 1)]

    def grouped():
        ends = torch.tensor([2, 7, 8], dtype=torch.int32)
        torch.nn.functional.grouped_mm(torch.cat(parts), stack, offs=ends)

    def looped():
        for part, matrix in zip(parts, stack, strict=True):
            part @ matrix

    for run in (grouped, looped):
        rows, ways = seen_by(weights, run)
        assert all(ways[name] == {transposed} for name in weights)
        for name, part in zip(weights, parts, strict=True):
            assert torch.equal(rows[name], part)
    batch = torch.randn(3, 2, 4)
    rows, _ = seen_by(weights, lambda: torch.bmm(batch, stack))
    assert all(torch.equal(rows[str(i)], batch[i]) for i in range(3))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_that_are_picked_for_every_token(transposed):
    module = Bare(3, 4, 8) if transposed else Bare(3, 8, 4)
    weights = {str(i): Weight(module, "w", i, transposed) for i in range(3)}
    x, chosen = torch.randn(5, 4), torch.tensor([2, 0, 2, 2, 0])

    def batched():
        picked = module.w[chosen]
        if transposed:
            return torch.bmm(x.unsqueeze(1), picked)
        return torch.bmm(picked, x.unsqueeze(2))

    def summed():
        return torch.einsum("ti,tio->to" if transposed else "ti,toi->to", x, module.w[chosen])

    for run in (batched, summed):
        rows, ways = seen_by(weights, run)
        assert set(rows) == {"0", "2"} and all(ways[name] == {transposed} for name in rows)
        assert torch.equal(rows["0"], x[chosen == 0]) and torch.equal(rows["2"], x[chosen == 2])


def test_several_experts_for_every_token():
    module = Bare(4, 8, 6)
    weights = {str(i): Weight(module, "w", i) for i in range(4)}
    x, chosen = torch.randn(5, 6), torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0]])
    rows, ways = seen_by(weights, lambda: torch.einsum("ti,taoi->tao", x, module.w[chosen]))
    assert set(rows) == {"0", "1", "2"} and all(way == {False} for way in ways.values())
    for name in rows:
        assert torch.equal(rows[name], x[(chosen == int(name)).any(1)])


def norms_of(model, batches):
    with hooks.evaluating(model):
        weights = choose_weights(model).weights
        return Calibrator(model, [], weights, batches).gather(weights, None, ("norm",))


def test_attention_by_itself_and_across():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
            self.b = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)

        def forward(self, x, y, k, v):
            z = self.a(x, x, x)[0] + self.a(x, y, y)[0]
            return self.b(z.transpose(0, 1), k, v)[0]

    torch.manual_seed(0)
    model, x, y = Cross(), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    batch = {"x": x, "y": y, "k": torch.randn(5, 2, 6), "v": torch.randn(5, 2, 4)}
    found = norms_of(model, [batch])
    assert set(found) == set(find_weights(model))
    both = torch.cat([x.reshape(-1, 8), y.reshape(-1, 8)])
    torch.testing.assert_close(found["a.in_proj_weight.k"].norm, both.norm(dim=0))
    assert found["a.in_proj_weight.q"].count == 12
    torch.testing.assert_close(found["b.v_proj_weight"].norm, batch["v"].reshape(-1, 4).norm(dim=0))
    assert found["a.out_proj"].count == 12


@pytest.mark.parametrize("batch_first", [False, True])
def test_every_step_of_a_recurrent_layer(batch_first):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(4, 6, 2, batch_first=batch_first))
    x = torch.randn(3, 5, 4)
    found = norms_of(model, [x])
    assert len(found) == 4
    torch.testing.assert_close(found["0.weight_ih_l0"].norm, x.reshape(-1, 4).norm(dim=0))
    steps = x if not batch_first else x.transpose(0, 1)
    state, states = None, []
    first = nn.LSTM(4, 6)
    first.load_state_dict({k: v for k, v in model[0].state_dict().items() if k.endswith("l0")})
    with torch.no_grad():
        for step in steps:
            states.append(torch.zeros(len(step), 6) if state is None else state[0][0])
            _, state = first(step[None], state)
    torch.testing.assert_close(
        found["0.weight_hh_l0"].norm, torch.cat(states).norm(dim=0), rtol=1e-4, atol=1e-5
    )


def test_fused_layers_are_seen_and_the_switches_put_back():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert len(norms_of(nn.Sequential(layer), [X.repeat(1, 1, 2)])) == 6
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled
    with pytest.raises(KeyError), unfused([nn.LSTM(2, 2)]):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


def test_a_weight_that_is_read_beside_its_layer_counts_both_uses():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            return self.f(x) + (2 * x) @ self.f.weight.t()

    found = norms_of(Both(), [FLAT])["f"]
    assert found.count == 20
    torch.testing.assert_close(found.norm, torch.cat([FLAT, 2 * FLAT]).norm(dim=0))
