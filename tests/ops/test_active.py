"""Products over active neurons against plain float64, on every set of instructions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.ops import _dispatch
from gossamer.ops import active as ops

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [*(name for index, name in enumerate(_dispatch.ISAS) if index <= best), "reference"]
KINDS = [
    (torch.float32, "neuron"),
    (torch.bfloat16, "neuron"),
    (torch.int8, "neuron"),
    (torch.int8, "across"),
]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected_linear(x, neurons, bias, threshold):
    kept = torch.where(x.float().abs() > threshold, x.float(), 0.0).double()
    return kept @ neurons.to_float().double() + (0 if bias is None else bias.double())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 65), (300, 130), (513, 64), (200, 700)], ids=str)
def test_columns_above_a_threshold(isa, kind, shape, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    neurons, bias = ops.store(random(*shape), *kind), random(shape[1], seed=1)
    for rows in (0, 1, 3):
        x = random(rows, shape[0], seed=2)
        for threshold in (0.0, 0.7, 100.0):
            found = ops.linear(x, neurons, bias, threshold=threshold)
            expected = expected_linear(x, neurons, bias, threshold)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)
    half = ops.linear(x.bfloat16(), neurons, threshold=0.5)
    assert half.dtype == torch.bfloat16
    exact = ops.linear(x.bfloat16().float(), neurons, threshold=0.5)
    assert torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("isa", ISAS)
def test_columns_of_an_index_list(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    neurons, x = ops.store(random(40, 33), torch.float32), random(2, 40, seed=1)
    for chosen in ([], [39], [3, 4, 9, 11, 12], list(range(40))):
        for dtype in (torch.int32, torch.int64):
            index = torch.tensor(chosen, dtype=dtype)
            found = ops.linear(x, neurons, index=index)
            torch.testing.assert_close(found, x[:, chosen] @ neurons.values[chosen])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("by", ["product", "gate"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gated_mlp(isa, by, kind, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for neurons, width, out in ((1, 1, 1), (150, 65, 130), (331, 256, 47)):
        gate, up, down = (
            ops.store(random(neurons, size, seed=seed), *kind)
            for seed, size in enumerate((width, width, out))
        )
        x = random(2, width, seed=5)
        score = torch.nn.functional.silu(x.double() @ gate.to_float().double().t())
        hidden = score * (x.double() @ up.to_float().double().t())
        score = score if by == "gate" else hidden
        ranked = score.abs().reshape(-1).sort().values
        limit = float(ranked[(len(ranked) - 1) // 2 :][:2].mean())  # between two scores
        kept = torch.where(score.abs() > limit, hidden, 0.0)
        found = ops.gated_mlp(x, gate, up, down, threshold=limit, by=by)
        expected = kept @ down.to_float().double()
        size = expected.abs().max().item() + 1
        torch.testing.assert_close(found.double() / size, expected / size, rtol=1e-4, atol=1e-4)
        k = neurons // 3
        top = score.abs().topk(k, dim=-1).indices
        kept = torch.zeros_like(hidden).scatter(1, top, hidden.gather(1, top))
        found = ops.gated_mlp(x, gate, up, down, k=k, by=by)
        expected = kept @ down.to_float().double()
        torch.testing.assert_close(found.double() / size, expected / size, rtol=1e-4, atol=1e-4)


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, max_size=40), st.integers(0, 40), st.floats(0, 10))
def test_choices_agree_with_their_definition(values, k, threshold):
    x = torch.tensor(values, dtype=torch.float32)
    threshold = torch.tensor(threshold, dtype=torch.float32).item()
    size = [math.inf if math.isnan(v) else abs(v) for v in x.tolist()]
    nan = [math.isnan(v) for v in x.tolist()]
    wanted = [j for j in range(len(size)) if nan[j] or size[j] > threshold]
    assert ops.above(x, threshold).tolist() == wanted
    k = min(k, len(size))
    order = sorted(range(len(size)), key=lambda j: (not nan[j], -size[j], j))
    assert ops.largest(x, k).tolist() == sorted(order[:k])


@pytest.mark.parametrize("isa", ISAS)
def test_choices_on_every_path(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    x = torch.tensor([0.0, -2.0, 2.0, float("nan"), float("-inf"), -0.0, 1.0, 2.0])
    assert ops.above(x, 0.0).tolist() == [1, 2, 3, 4, 6, 7]
    assert ops.above(x.bfloat16(), 1.0).tolist() == [1, 2, 3, 4, 7]
    assert ops.largest(x, 3).tolist() == [1, 3, 4]
    assert ops.largest(x, 4).tolist() == [1, 2, 3, 4]
    assert ops.largest(x, 0).tolist() == []
    assert ops.above(torch.empty(0), 1.0).tolist() == []


@pytest.mark.parametrize("isa", ISAS)
def test_inactive_columns_are_not_read_and_odd_inputs_are_seen(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    weights, x = random(20, 70), random(20, seed=1)
    x[4] = 0.01
    weights[4] = float("nan")
    neurons = ops.store(weights, torch.float32)
    assert torch.isfinite(ops.linear(x, neurons, threshold=0.02)).all()
    assert torch.isnan(ops.linear(x, neurons, threshold=0.001)).all()
    x[5] = float("nan")
    assert torch.isnan(ops.linear(x, neurons, threshold=0.02)).all()
    gate = ops.store(random(20, 20, seed=3), torch.float32)
    assert torch.isnan(ops.gated_mlp(x, gate, gate, neurons, k=3)).all()


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_threads_do_not_change_the_result(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    neurons, x = ops.store(random(700, 300), torch.int8), random(700, seed=1)
    turned = ops.store(random(700, 300, seed=3))
    down = ops.store(random(700, 130, seed=4))

    def run():
        y = ops.linear(x, neurons, threshold=0.5)
        return torch.cat([y, ops.gated_mlp(y, turned, turned, down, k=50)])

    one, *others = over_threads(run, (1, 2, 3, 9, 17))
    assert all(torch.equal(one, other) for other in others)


def test_statistical_top_k():
    x = random(64, 4096)
    count = (ops.statistical_top_k(x, 328) > 0).sum(-1).float()
    assert abs(count.mean() / 328 - 1) < 0.05
    theta = ops.statistical_threshold(x, 328)
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 328 / 4096))
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=0)
    torch.testing.assert_close(theta, mean + quantile * std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ops.statistical_top_k(x, 328), (x - theta).clamp_min(0))
    small = random(2, 9, seed=1).double().requires_grad_()
    assert ops.statistical_top_k(small.float(), 3).sum().backward() is None
    assert small.grad is not None and torch.isfinite(small.grad).all()
    for k in (0, 9, True):
        with pytest.raises(UsageError, match="whole number"):
            ops.statistical_threshold(small, k)


@pytest.mark.parametrize("isa", ["native", "reference"])
def test_int8_rounds_to_the_nearest_step(isa, monkeypatch):
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", isa)
    neurons = random(5, 40)
    neurons[2] = 0
    for scale, axis in (("neuron", 1), ("across", 0)):
        stored = ops.store(neurons, torch.int8, scale)
        step = neurons.abs().amax(axis, keepdim=True) / 127
        assert bool(((stored.to_float() - neurons).abs() <= step * 0.5001 + 1e-9).all())
    assert ops.store(torch.empty(0, 4), torch.int8).values.shape == (0, 4)
    assert ops.linear(torch.empty(0), ops.store(torch.empty(0, 4))).tolist() == [0.0] * 4
    with pytest.raises(NonFiniteError):
        ops.store(torch.tensor([[float("inf")]]), torch.int8)


def test_opcheck():
    neurons, x = ops.store(random(12, 20), torch.int8), random(2, 12, seed=1)
    index = torch.tensor([1, 5], dtype=torch.int32)
    check = torch.library.opcheck
    for chosen in (None, index):
        check(ops._active_linear, (x, neurons.values, neurons.scale, None, chosen, 0.3))
    gate = ops.store(random(9, 12))
    down = ops.store(random(9, 7), torch.int8, "across")
    parts = (gate.values, None, gate.values, None, down.values, down.scale)
    check(ops._active_gated_mlp, (x, *parts, 0.0, 3, False))
    check(ops._above, (x[0], 0.5))
    check(ops._largest, (x[0], 3))


def test_bad_input():
    neurons, x = ops.store(random(12, 20)), random(12)
    for call, words in [
        (lambda: ops.linear(random(11), neurons), "width 12"),
        (lambda: ops.linear(x.half(), neurons), "float16"),
        (lambda: ops.linear(x, neurons, random(19)), "bias"),
        (lambda: ops.linear(x, neurons, threshold=-1.0), "from 0"),
        (lambda: ops.linear(x, neurons, threshold=float("nan")), "from 0"),
        (lambda: ops.linear(x, neurons, index=torch.tensor([12])), "outside"),
        (lambda: ops.linear(x, neurons, index=torch.tensor([-1])), "outside"),
        (lambda: ops.linear(x, neurons, index=torch.tensor([0.5])), "int32"),
        (lambda: ops.largest(x, 13), "from 0 to 12"),
        (lambda: ops.above(x.reshape(3, 4), 0.0), "vector"),
        (lambda: ops.gated_mlp(random(20), neurons, neurons, neurons), "either"),
        (
            lambda: ops.gated_mlp(random(20), neurons, neurons, neurons, k=1, threshold=1.0),
            "either",
        ),
        (lambda: ops.gated_mlp(random(20), neurons, neurons, neurons, k=13), "from 0 to 12"),
        (lambda: ops.gated_mlp(random(20), neurons, neurons, neurons, k=1, by="up"), "'up'"),
        (
            lambda: ops.gated_mlp(random(20), neurons, ops.store(random(11, 20)), neurons, k=1),
            "neuron",
        ),
        (lambda: ops.store(random(3, 3), torch.float16), "float16"),
        (lambda: ops.store(random(3, 3), torch.int8, "block"), "block"),
        (lambda: ops.Neurons(torch.zeros(3, 3, dtype=torch.int8)), "scale"),
        (lambda: ops.Neurons(torch.zeros(3, 4).t()), "contiguous"),
        (lambda: ops.Neurons(torch.zeros(3, 3, dtype=torch.int8), torch.ones(2, 1)), "scale is"),
    ]:
        with pytest.raises(UsageError, match=words):
            call()
