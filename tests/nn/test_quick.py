"""Costs measured on the spot: what is asked is timed, once, for a bounded time."""

from functools import partial

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.nn import BitmapLinear, NMLinear, PackedConv2d
from gossamer.nn.kernel_choice import quick
from gossamer.nn.kernel_choice.decide import choose_forms, prepare_where_it_pays, why_dense
from gossamer.nn.kernel_choice.latency import ProductShape
from gossamer.nn.kernel_choice.machine import known_latency, use_latency
from gossamer.nn.kernel_choice.quick import QuickLatency
from gossamer.nn.kernel_choice.timings import read_timings, store_timings
from gossamer.ops._dispatch import isa_index

AMPLE = 1e9
"""Seconds that no machine takes, however busy."""
FAST = {"dense": 5.0, "bitmap-matvec": 2.0, "csr-matvec": 3.0, "sell-spmm": 1.0, "bitmap-spmm": 4.0,
        "bitmap-unpack": 6.0, "block-spmm": 0.5}  # fmt: skip


@pytest.fixture
def timed(monkeypatch):
    """Calls of the timing, which says what FAST says, in milliseconds per million weights."""
    calls = []

    def in_turns(layers, x, patience):
        with torch.inference_mode():
            shapes = {name: each[0](x).shape for name, each in layers.items()}
        assert len(set(shapes.values())) == 1  # they do the same
        calls.append((sorted(layers), tuple(x.shape)))
        return {n: 1e-3 * FAST.get(n, 1.0 if "sparse" in n else 7.0) for n in layers}

    monkeypatch.setattr(quick, "in_turns", in_turns)
    monkeypatch.setattr(quick, "calm", lambda: 1.0)
    return calls


def net(density=0.3, out=256, inputs=512):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, out), nn.ReLU(), nn.Linear(out, inputs))
    for layer in (model[0], model[2]):
        layer.weight.data[torch.rand_like(layer.weight) > density] = 0
    return model


def test_every_shape_is_timed_once_and_decides(timed):
    known = QuickLatency(AMPLE)
    for batches in (True, True, False):
        result = gs.compress(net(), latency=known, large_batches=batches)
        assert all(isinstance(result.model[i], BitmapLinear) for i in (0, 2))
    rows = [shape for _, shape in timed]
    assert sorted(set(rows)) == sorted(rows) == [(1, 256), (1, 512), (16, 256), (16, 512),
                                                 (128, 256), (128, 512)] or len(rows) == 4  # fmt: skip
    record = result.layers[0]
    assert record.decided.startswith(
        "by measured latencies: timed here bitmap-matvec 2 ms, csr-matvec"
    )
    assert record.predicted["dense"] == 5e-3


def test_what_would_be_slower_stays_dense_and_says_so(timed, monkeypatch):
    monkeypatch.setitem(FAST, "dense", 0.1)
    result = gs.compress(net(), latency=QuickLatency(AMPLE), large_batches=True)
    assert all(type(result.model[i]) is nn.Linear for i in (0, 2))
    assert result.layers[0].reason.startswith("no kernel wins: timed here dense 0.1 ms, sell-spmm")
    assert result.summary == "0 of 2 layers run sparse, 2 dense (2 no kernel wins)"
    packed = gs.compress(net(), latency="rule").model[0]
    assert why_dense(packed, QuickLatency(AMPLE), True).startswith(
        "no kernel wins: timed here dense"
    )
    assert (
        why_dense(packed, QuickLatency(AMPLE), False) is not None
        and why_dense(packed, None, True) is None
    )
    monkeypatch.setitem(FAST, "dense", 5.0)
    assert why_dense(packed, QuickLatency(AMPLE), True) is None


def test_other_kinds_are_asked_about_too(timed, monkeypatch):
    conv = nn.Conv2d(8, 16, 3, 2, 1)
    conv.weight.data[torch.rand_like(conv.weight) > 0.1] = 0
    model = nn.Sequential(conv)
    assert "sparse-conv" in gs.compress(model, latency=QuickLatency(AMPLE)).layers[0].kernel
    assert (
        isinstance(model[0], PackedConv2d)
        and why_dense(model[0], QuickLatency(AMPLE), True) is None
    )
    blocks = gs.prune(net(1.0), gs.weights.Magnitude(), pattern=gs.Block(16, 1), density=0.25)
    result = gs.compress(blocks, latency=QuickLatency(AMPLE), large_batches=True)
    assert "block-spmm" in result.layers[0].kernel
    pruned = gs.prune(
        nn.Sequential(nn.Linear(640, 64)), gs.weights.Magnitude(), pattern=gs.NM(1, 4)
    )
    layer = gs.compress(pruned, latency=QuickLatency(AMPLE), large_batches=False).model[0]
    assert isinstance(layer, NMLinear) and why_dense(layer, QuickLatency(AMPLE), False) is None
    ints = gs.compress(net(), latency=QuickLatency(AMPLE), bits=8).layers[0]
    assert "timed here" in ints.decided


def test_after_the_time_is_up_the_nearest_shape_counts(timed):
    known = QuickLatency(budget=1e-9)
    near = ProductShape(100, 200, 0.5)
    assert known.seconds("dense", "float32", 1, near) == 5e-3
    assert known.seconds("dense", "float32", 1, ProductShape(200, 200, 0.52)) == 1e-2
    assert known.seconds("bitmap-matvec", "float32", 1, ProductShape(100, 200, 0.1)) == 2e-3
    assert len(timed) == 1
    for other in (("float32", 128), ("bfloat16", 1)):
        assert known.seconds("dense", *other, near) is None
    assert gs.compress(net(), latency=known, large_batches=True).layers[0].decided == "by rule"


def test_loading_goes_by_it_too(timed, tmp_path):
    gs.save(gs.compress(net(), latency="rule"), tmp_path / "out")
    model, known = (
        gs.load(tmp_path / "out", model=net(), latency="rule", large_batches=False),
        QuickLatency(AMPLE),
    )
    use_latency(model, known)
    choose_forms(model, known, True)
    prepare_where_it_pays(model, known)
    assert model[0].large_batches_decided.startswith(
        "prepared by measured latencies: timed here sell-spmm"
    )
    assert model[0].rows_decided.startswith("bitmap read by measured latencies: timed here")


def test_a_busy_machine_is_noted(timed, monkeypatch):
    monkeypatch.setattr(quick, "calm", lambda: 0.5)
    assert (
        gs.compress(net(), latency=QuickLatency(AMPLE))
        .layers[0]
        .decided.endswith("(on a busy machine)")
    )


def test_nothing_is_measured_where_nobody_asks(monkeypatch):
    monkeypatch.setattr(quick, "in_turns", lambda *_: pytest.fail("measured"))
    assert known_latency("rule") is None
    gs.compress(net(), latency="rule")


def test_real_times_change_no_random_state():
    if isa_index() < 0:
        pytest.skip("the kernels are not built")
    state, known = torch.random.get_rng_state(), QuickLatency(AMPLE)
    shape = ProductShape(256, 256, 0.1)
    times = [
        known.seconds(n, "float32", 1, shape) for n in ("dense", "bitmap-matvec", "csr-matvec")
    ]
    assert all(0 < taken < 0.1 for taken in times)
    free = known.seconds("bitmap-matvec", "float32", 1, shape, calls=False)
    assert 0 < free < times[1] or free == 1e-9
    assert known.seconds("nothing", "float32", 1, shape) is None
    assert torch.equal(state, torch.random.get_rng_state()) and known.spent > 0


def test_what_was_timed_is_remembered_between_processes(timed, tmp_path, monkeypatch):
    path = tmp_path / "new" / "timings.json"
    keep = partial(store_timings, path)
    first = gs.compress(net(), latency=QuickLatency(AMPLE, store=keep), large_batches=False)
    count = len(timed)
    again = QuickLatency(AMPLE, found=read_timings(path), store=keep)
    second = gs.compress(net(), latency=again, large_batches=False)
    assert len(timed) == count > 0 and again.spent == 0
    assert [x.decided for x in second.layers] == [x.decided for x in first.layers]
    for damage in ("[", "{}", '[{"kind": "linear"}]', path.read_text().replace("0.002", "-1")):
        path.write_text(damage)
        assert read_timings(path) == {}
    monkeypatch.setattr(quick, "calm", lambda: 0.1)
    path.unlink()
    gs.compress(net(), latency=QuickLatency(AMPLE, store=keep), large_batches=False)
    assert not path.exists()  # of a busy machine nothing is kept


def test_calls_that_read_longer_than_products_leave_it_to_the_rule(monkeypatch):
    """On a busy machine: a difference of nothing would choose the kernel at random."""
    shape = ProductShape(256, 256, 0.5)

    def measured(kind, dtype, rows, shape):
        tiny = shape.out == 16
        return {"dense": 3e-6 if tiny else 2e-6, "bitmap-matvec": 1e-6 if tiny else 4e-6}

    monkeypatch.setattr("gossamer.nn.kernel_choice.quick._measure", measured)
    known = QuickLatency(AMPLE)
    assert known.seconds("dense", "float32", 1, shape) == 2e-6
    assert known.seconds("dense", "float32", 1, shape, calls=False) is None
    assert known.seconds("bitmap-matvec", "float32", 1, shape, calls=False) is None
