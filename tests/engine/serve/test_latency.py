"""The cost model chooses what it says is fastest, and survives whatever lies in the cache."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.errors import DisturbedError
from gossamer.engine.serve import measure_latency as measure_latency
from gossamer.nn import BitmapLinear, NMLinear, PackedConv2d
from gossamer.nn.kernel_choice import timing
from gossamer.nn.kernel_choice.latency import LatencyModel, ProductShape, fit
from gossamer.nn.kernel_choice.machine import (
    cache_file,
    cached_latency,
    machine,
    read_latency,
    store_latency,
)
from gossamer.ops._dispatch import ISAS, isa_index
from gossamer.ops.bitmap import native
from gossamer.ops.quantized.native import has_byte_products

BYTE = 1e-9


def terms(call=0.0, every=0.0, kept=0.0, loads=0.0):
    return (call, 0.0, every, kept, loads)


def latency(**changes):
    """Dense by its positions, kernels by what they keep and a dear call."""
    known = {
        "dense": {1: terms(1e-6, BYTE), 128: terms(1e-5, 20 * BYTE)},
        "bitmap-matvec": {1: terms(3e-6, 0.1 * BYTE, BYTE)},
        "sell-spmm": {128: terms(5e-5, 0, 30 * BYTE)},
        "block-spmm": {128: terms(5e-5, 0, 10 * BYTE, 10 * BYTE)},
        "bitmap-unpack": {16: terms(0, 5 * BYTE), 128: terms(0, 25 * BYTE)},
        "bitmap-spmm": {16: terms(0, 0, 9 * BYTE), 128: terms(0, 0, 60 * BYTE)},
        "dense-conv": {196: terms(0, 20 * BYTE)},
        "sparse-conv": {196: terms(0, 0, 100 * BYTE)},
        "tiled-conv": {196: terms(0, 0, 20 * BYTE, 80 * BYTE)},
        "dense-conv-3x3": {196: terms(0, 30 * BYTE)},
        "sparse-conv-3x3": {196: terms(0, 0, 100 * BYTE)},
        "tiled-conv-3x3": {196: terms(0, 0, 20 * BYTE, 80 * BYTE)},
        "dense-conv-3x3s2": {196: terms(0, 5 * BYTE)},
        "sparse-conv-3x3s2": {196: terms(0, 0, 100 * BYTE)},
        "dense-conv-1x1s2": {196: terms(0, 50 * BYTE)},
        "sparse-conv-1x1s2": {196: terms(0, 0, 100 * BYTE)},
        **{name.replace("_", "-"): by_rows for name, by_rows in changes.items()},
    }
    return LatencyModel(machine(), {f"{name} float32": by_rows for name, by_rows in known.items()})


def layer(out=256, inputs=512, density=0.5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs, out))
    net[0].weight.data[torch.rand(out, inputs) > density] = 0
    return net


def chosen(net, **options):
    return gs.compress(net, **{"latency": latency(), "large_batches": False, **options}).layers[0]


def test_fit_finds_costs_that_made_the_times():
    made = torch.tensor([2e-6, 0.0, 3e-10, 1e-9, 0.0], dtype=torch.float64)
    works = [
        ProductShape(o, i, d) for o, i in ((64, 64), (100, 900), (800, 70)) for d in (0.1, 0.9)
    ]
    points = [(w, float(made @ torch.tensor(w.terms(), dtype=torch.float64))) for w in works]
    found = LatencyModel({}, {"dense float32": {1: fit(points)}})
    for shape in (*works, ProductShape(3000, 17, 0.3)):
        exact = float(made @ torch.tensor(shape.terms(), dtype=torch.float64))
        assert found.seconds("dense", "float32", 1, shape) == pytest.approx(exact, rel=1e-6)


def test_fit_never_gives_negative_costs():
    points = [
        (ProductShape(64, 64, 0.1), 1e-3),
        (ProductShape(64, 64, 0.9), 1e-4),
        (ProductShape(640, 64, 0.9), 1e-3),
    ]
    assert min(fit(points)) >= 0 and max(fit(points)) > 0


@pytest.mark.parametrize("name", ["bitmap-matvec", "sell-spmm", "sparse-conv"])
def test_more_kept_weights_and_more_rows_never_get_cheaper(name):
    model = latency(sell_spmm={16: terms(9e-5, 0, BYTE), 128: terms(0, 0, 2 * BYTE)})
    for rows in (1, 8, 16, 60, 128, 1000):
        times = [
            model.seconds(name, "float32", rows, ProductShape(64, 64, d / 10)) for d in range(1, 11)
        ]
        assert times == sorted(times)
    times = [
        model.seconds("dense", "float32", rows, ProductShape(64, 64)) for rows in (1, 9, 128, 999)
    ]
    assert times == sorted(times) and times[-1] > times[-2]
    assert model.seconds("dense", "float16", 1, ProductShape(1, 1)) is None


def test_the_fastest_is_chosen_and_the_record_says_what_was_predicted():
    record = chosen(net := layer())
    assert isinstance(net[0], BitmapLinear) and record.kernel.startswith("bitmap-matvec/")
    assert record.decided.startswith("by measured latencies: predicted bitmap-matvec")
    assert record.decided.endswith("for 1 row")
    positions = 256 * 512
    assert record.predicted["dense"] == pytest.approx(1e-6 + positions * BYTE)
    expected = 3e-6 + (0.1 + record.density) * positions * BYTE
    assert record.predicted["bitmap-matvec"] == pytest.approx(expected)


@pytest.mark.parametrize(("out", "density"), [(256, 0.97), (4, 0.3)])
def test_nearly_dense_and_tiny_layers_stay_dense_and_say_so(out, density):
    record = chosen(net := layer(out, density=density))
    assert isinstance(net[0], nn.Linear) and record.kernel is None
    assert record.reason.startswith("no kernel wins: predicted dense")
    assert record.predicted["dense"] < record.predicted["bitmap-matvec"]
    with pytest.raises(gs.UsageError, match="no kernel wins"):
        chosen(layer(out, density=density), strict=True)


def test_other_costs_flip_the_decision():
    slow = latency(bitmap_matvec={1: terms(0, 0, 3 * BYTE)})
    assert chosen(layer(), latency=slow).kernel is None
    assert chosen(layer(), latency="rule").decided == "by rule"
    assert chosen(layer(density=0.97), latency=latency(dense={1: terms(1.0)})).kernel


def test_batches_choose_among_all_forms():
    record = chosen(net := layer(density=0.3), large_batches=True)
    assert record.kernel.endswith(net[0].batch_kernel) and "sell" in net[0].batch_kernel
    assert set(record.predicted) == {"dense", "sell-spmm", "bitmap-unpack", "bitmap-spmm"}
    assert record.decided.endswith("for 128 rows")
    straight = latency(bitmap_spmm={16: terms(), 128: terms(0, 0, BYTE)})
    record = chosen(net := layer(density=0.3), large_batches=True, latency=straight)
    assert net[0].batch_kernel is None and record.kernel.startswith("bitmap-matvec")
    assert chosen(layer(density=0.9), large_batches=True).kernel is None


SLOW_FORM = {128: terms(0, 0, 400 * BYTE)}
"""Every other way to serve batches is predicted to beat the form for them."""


@pytest.mark.parametrize("slow", [None, SLOW_FORM], ids=["pays", "does not"])
def test_load_prepares_where_compress_does(slow, tmp_path):
    known = latency() if slow is None else latency(sell_spmm=slow)
    net = nn.Sequential(layer(density=0.3)[0], layer(512, 256, density=0.2)[0])
    records = gs.compress(net, latency=known, large_batches=True).layers
    gs.save(net, tmp_path / "out")

    def again(**options):
        return gs.load(tmp_path / "out", model=nn.Sequential(*layer(), *layer(512, 256)), **options)

    found = again(large_batches=True, latency=known)
    x = torch.randn(40, 512)
    for loaded, packed, record in zip(found, net, records, strict=True):
        assert loaded.batch_kernel == packed.batch_kernel
        assert (loaded.batch_kernel is not None) == (slow is None)
        verdict = "prepared" if slow is None else "not prepared"
        assert loaded.large_batches_decided.startswith(
            f"{verdict} by measured latencies: predicted "
        )
        assert packed.large_batches_decided == loaded.large_batches_decided
        for name, seconds in record.predicted.items():
            told = f"{name} {1e3 * seconds:.3g} ms" in loaded.large_batches_decided
            assert told == (name != "dense")
    torch.testing.assert_close(found(x), net(x), rtol=1e-4, atol=1e-4)
    forced = again(large_batches=True, latency="rule")
    assert [each.large_batches_decided for each in forced] == ["prepared by rule"] * 2
    assert all(each.batch_kernel for each in forced) and "batches=sell" in repr(forced[0])
    plain = again(large_batches=False, latency=known)
    assert not any(each.batch_kernel or each.large_batches_decided for each in plain)


def test_load_goes_by_what_is_stored_and_without_it_by_rule(cache, tmp_path):
    gs.save(
        gs.compress(layer(density=0.3), latency=latency(), large_batches=False), tmp_path / "out"
    )
    found = gs.load(tmp_path / "out", model=layer(), large_batches=True)[0]
    assert found.large_batches_decided == "prepared by rule" and found.batch_kernel
    store_latency(latency(sell_spmm=SLOW_FORM))
    found = gs.load(tmp_path / "out", model=layer(), large_batches=True)[0]
    assert found.batch_kernel is None and found.large_batches_decided.startswith("not prepared")


def test_nm_layers_are_judged_against_unpacking_which_is_what_they_do(tmp_path):
    torch.manual_seed(0)
    pruned = gs.prune(
        nn.Sequential(nn.Linear(640, 64)), gs.weights.Magnitude(), pattern=gs.NM(1, 8)
    )
    fast = gs.compress(pruned, latency=latency(), large_batches=False).model
    assert isinstance(fast[0], NMLinear)
    gs.save(fast, tmp_path / "out")
    for each, wins in ((latency(), True), (latency(sell_spmm=SLOW_FORM), False)):
        empty = nn.Sequential(nn.Linear(640, 64))
        found = gs.load(tmp_path / "out", model=empty, large_batches=True, latency=each)[0]
        assert (found.batch_kernel is not None) == wins
        assert "bitmap-spmm" not in found.large_batches_decided


def test_blocks_are_judged_by_their_kernel():
    net = layer(density=1.0)
    pruned = gs.prune(net, gs.weights.Magnitude(), pattern=gs.Block(4, 1), density=0.5)
    record = chosen(pruned, large_batches=True)
    assert "block-spmm" in record.kernel
    kept = 0.5 * 256 * 512
    assert record.predicted["block-spmm"] == pytest.approx(5e-5 + (10 + 2.5) * kept * BYTE)


def integers(**seconds):
    """Seconds per 1e9 positions of one row, 1 unless told; with 128 rows slow forms are fast."""
    names = {"bitmap_matvec": 1.0, "dense": 1.0, **seconds}
    known = {
        f"{name.replace('_', '-')} int4": {
            1: terms(0, each * BYTE),
            128: terms(0, 99 * BYTE / each),
        }
        for name, each in names.items()
    }
    return LatencyModel(machine(), known)


def test_integers_are_held_in_the_faster_form(tmp_path):
    """The faster by costs for the rows that the model sees, dense or not as files hold it."""
    for dense, batches, form in ((0.5, False, "dense"), (2.0, False, "sparse"),
                                 (0.5, True, "sparse"), (2.0, True, "dense")):  # fmt: skip
        known = integers(dense=dense)
        record = gs.compress(net := layer(), bits=4, latency=known, large_batches=batches).layers[0]
        assert net[0].sparse and (net[0].bitmap is None) == (form == "dense")
        told = f"asked for; {form} integers in memory by measured latencies: predicted "
        assert record.decided.startswith(told)
        assert record.sparse_bytes == net[0].stored.nbytes < record.dense_bytes / 4
        kind = "int4-dense" if form == "dense" else "int4-matvec"
        assert record.kernel.startswith(kind) and kind in str(record)
        gs.save(net, tmp_path / "out", overwrite=True)
        again = gs.load(tmp_path / "out", model=layer(), latency=known, large_batches=batches)[0]
        assert again.form_decided == net[0].form_decided and again.kept == net[0].kept
        x = torch.randn(3, 512)
        torch.testing.assert_close(again(x), net[0](x))


def test_columns_are_read_where_that_is_faster(monkeypatch, tmp_path):
    """By costs at any density, by rule at low ones."""
    cheap = latency(csr_matvec={1: terms(0, 0, 0.5 * BYTE)})
    record = chosen(net := layer(density=0.4), latency=cheap)
    assert record.kernel.startswith("csr-matvec") and "csr-matvec" in record.predicted
    assert net[0].rows_decided.startswith("columns read by measured latencies: predicted ")
    gs.save(net, tmp_path / "out")
    again = gs.load(tmp_path / "out", model=layer(), latency=cheap, large_batches=False)[0]
    assert torch.equal(again.columns, net[0].columns)
    dear = latency(csr_matvec={1: terms(0, 0, 5 * BYTE)})
    record = chosen(net := layer(density=0.05), latency=dear)
    assert record.kernel.startswith("bitmap-matvec") and net[0].columns is None
    record = chosen(net := layer(density=0.05), latency=cheap, large_batches=True)
    assert net[0].columns is not None and record.kernel.startswith("csr-matvec")
    assert net[0].batch_kernel in record.kernel
    for isa, density, reads in (("avx512", 0.08, True), ("avx512", 0.2, False),
                                ("avx2", 0.2, True), ("portable", 0.02, False)):  # fmt: skip
        if ISAS.index(isa) > isa_index():
            continue
        monkeypatch.setenv("GOSSAMER_ISA", isa)
        chosen(net := layer(density=density), latency="rule")
        monkeypatch.delenv("GOSSAMER_ISA")
        assert (net[0].columns is not None) == reads
        assert net[0].rows_decided == f"{'columns' if reads else 'bitmap'} read by rule"


def test_integers_by_rule(monkeypatch):
    if isa_index() < 1:
        pytest.skip("the rule is about vectors")
    held = {bits: gs.compress(layer(), bits=bits, latency="rule").model[0] for bits in (4, 8)}
    assert held[4].bitmap is None and held[4].form_decided == "dense integers in memory by rule"
    assert (held[8].bitmap is None) == (not has_byte_products())
    even = gs.prune(layer(density=1.0), gs.weights.Magnitude(), pattern=gs.NM(2, 4))
    if has_byte_products():
        assert gs.compress(even, bits=4, latency=integers(dense=0.1)).model[0].bitmap is not None
    monkeypatch.setenv("GOSSAMER_ISA", "portable")
    assert gs.compress(layer(), bits=4, latency="rule").model[0].bitmap is not None


def convolution(density, group=1, **shape):
    """Random zeros, the same for `group` neighbouring outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, **{"kernel_size": 3, "padding": 1, **shape}))
    weight = net[0].weight.data
    mask = torch.rand(64 // group, *weight.shape[1:]) > density
    weight[mask.repeat_interleave(group, 0)] = 0
    return net


@pytest.mark.parametrize(
    ("density", "shape", "per_position", "per_kept"),
    [
        (0.1, {"kernel_size": 1, "padding": 0}, 20, 100),
        (0.1, {"kernel_size": 1, "padding": 0, "stride": 2}, 50, 100),
        (0.1, {"kernel_size": 1, "padding": 0, "stride": 4}, 20, 100),
        (0.1, {}, 30, 100),
        (0.1, {"kernel_size": (1, 3), "padding": (0, 1)}, 30, 100),
        (0.1, {"kernel_size": 5, "padding": 2}, 30, 100),
        (0.1, {"stride": 2}, 5, 100),
        (0.02, {"stride": 2}, 5, 100),
        (0.02, {"kernel_size": 7, "stride": (1, 2)}, 5, 100),
    ],
)
def test_convolutions_of_every_kernel_are_judged_by_their_family(
    density, shape, per_position, per_kept
):
    net = convolution(density, **shape)
    record = gs.compress(net, latency=latency()).layers[0]
    positions = net[0].weight.numel() if isinstance(net[0], nn.Conv2d) else 64 * record.shape[1]
    dense, sparse = per_position * positions * BYTE, per_kept * record.density * positions * BYTE
    assert record.predicted == pytest.approx({"dense": dense, "sparse-conv": sparse})
    assert isinstance(net[0], PackedConv2d) == (sparse < dense) == (record.kernel is not None)
    assert "for 196 pixels" in (record.reason or record.decided)


def test_outputs_that_share_their_zeros_are_judged_as_tiles():
    """At density 0.3 tiles of random zeros share 1.6 outputs, groups of 4 share 4."""
    alone, groups = (
        gs.compress(convolution(0.3, group), latency=latency(), large_batches=False).layers[0]
        for group in (1, 4)
    )
    positions = 64 * 64 * 9
    for record, shared in ((alone, 4 * 0.3 / (1 - 0.7**4)), (groups, 4.0)):
        expected = (20 + 80 / shared) * record.density * positions * BYTE
        assert record.predicted["tiled-conv"] == pytest.approx(expected, rel=0.01)
    assert groups.predicted["tiled-conv"] < 0.6 * alone.predicted["tiled-conv"]
    slower = latency(dense_conv_3x3={196: terms(0, 15 * BYTE)})
    kept = [gs.compress(convolution(0.3, g), latency=slower).layers[0].kernel for g in (1, 4)]
    assert kept[0] is None and kept[1].startswith("tiled-conv/")


def test_convolutions_without_measured_costs_go_by_rule():
    few = latency()
    terms_ = {name: by for name, by in few.terms.items() if "3x3" not in name}
    record = gs.compress(convolution(0.1), latency=dataclasses.replace(few, terms=terms_)).layers[0]
    assert record.decided == "by rule" and record.kernel
    dilated = nn.Sequential(nn.Conv2d(64, 64, 3, dilation=2))
    dilated[0].weight.data[torch.rand_like(dilated[0].weight) > 0.1] = 0
    assert "no kernel" in gs.compress(dilated, latency=few).layers[0].reason


def test_unpacking_starts_where_the_costs_cross(monkeypatch):
    net = layer(density=0.4)
    gs.compress(net, latency=latency(), large_batches=False)
    first = net[0].unpack_from
    at = [
        latency().seconds(name, "float32", first, ProductShape(256, 512, net[0].density))
        for name in ("bitmap-unpack", "bitmap-spmm")
    ]
    assert 8 < first <= 1024 and at[0] <= at[1]
    never = latency(bitmap_unpack={16: terms(1.0)})
    assert never.unpack_from("float32", ProductShape(256, 512, 0.4)) > 1 << 60
    if isa_index() < 0:
        return
    unpacked = []
    right = native._unpacked
    monkeypatch.setattr(native, "_unpacked", lambda *a: unpacked.append(1) or right(*a))
    for rows in (first - 1, first):
        x = torch.randn(rows, 512)
        expected = x @ net[0].to_matrix().t() + net[0].bias
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
        assert len(unpacked) == (rows == first)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gossamer"


def test_what_is_stored_is_found_and_used(cache, tmp_path):
    assert cached_latency() is None and not cache.exists()
    assert chosen(layer(), latency=None).decided == "by rule"
    path = store_latency(latency())
    assert path == cache_file() and [p.name for p in cache.iterdir()] == [path.name]
    assert cached_latency() == latency() == read_latency(path)
    record = chosen(net := layer(density=0.4), latency=None)
    assert record.decided.startswith("by measured latencies")
    gs.save(net, tmp_path / "saved")
    assert gs.load(tmp_path / "saved", model=layer())[0].unpack_from == net[0].unpack_from


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100000,
        b"null",
        b"{}",
        b'{"version": 2, "machine": {}, "terms": {}}',
        b'{"version": 2, "machine": 3, "terms": {"dense float32": {"1": [0, 0, 1, 0, 0]}}}',
        b'{"version": 2, "machine": {}, "terms": {"dense float32": {"1": [0, 0, NaN, 0, 0]}}}',
        b'{"version": 2, "machine": {}, "terms": {"dense float32": {"1": [0, 0, -1, 0, 0]}}}',
        b'{"version": 2, "machine": {}, "terms": {"dense float32": {"1": [0, 1]}}}',
        b'{"version": 2, "machine": {}, "terms": {"dense float32": {"-1": [0, 0, 1, 0, 0]}}}',
        b'{"version": 2, "machine": {}, "terms": {"dense float32": []}}',
        b'{"version": 3, "machine": {}, "terms": {"dense float32": {"1": [0, 0, 1, 0, 0]}}}',
        b" " * (2 << 20),
    ],
)
def test_a_damaged_cache_is_no_cache(cache, content):
    cache.mkdir()
    cache_file().write_bytes(content)
    assert cached_latency() is None
    assert chosen(layer(), latency=None).decided == "by rule"
    with pytest.raises(gs.FormatError):
        read_latency(cache_file())


def test_another_machine_s_costs_are_not_used(cache):
    other = dataclasses.replace(latency(), machine={**machine(), "cpu": "another"})
    cache.mkdir()
    cache_file().write_text(json.dumps(other.to_json()))
    assert cached_latency() is None
    assert chosen(layer(), latency=other).kernel  # given by hand they are


def test_calibration_measures_every_kernel(cache, monkeypatch):
    if isa_index() < 0:
        pytest.skip("the kernels are not built")
    monkeypatch.setattr(measure_latency, "SHAPES", ((64, 64), (64, 128)))
    monkeypatch.setattr(measure_latency, "CONVOLUTIONS", ((16, 16),))
    monkeypatch.setattr(measure_latency, "PIXELS", (3, 5))
    monkeypatch.setattr(measure_latency, "WINDOWS", ((16, 8),))
    monkeypatch.setattr(measure_latency, "_seconds", lambda layers, x: 1e-6 * layers[0](x).numel())
    monkeypatch.setattr(measure_latency, "_usual", lambda *_: 1e-6)
    state = torch.random.get_rng_state()
    found = gs.calibrate_latency()
    assert torch.equal(state, torch.random.get_rng_state())
    assert cached_latency() == found and dict(found.machine) == machine()
    kernels = {"dense", "bitmap-matvec", "bitmap-unpack", "bitmap-spmm", "sell-spmm"}
    kernels.add("csr-matvec")
    names = {f"{k} {d}" for k in (*kernels, "block-spmm") for d in ("float32", "bfloat16")}
    names |= {f"{k} {d}" for k in ("dense", "bitmap-matvec") for d in ("int4", "int8")}
    kinds = ("dense-conv", "sparse-conv", "tiled-conv")
    families = ("", "-3x3", "-3x3s2", "-1x1s2")
    assert set(found.terms) == names | {f"{k}{f} float32" for k in kinds for f in families}
    assert set(found.terms["dense-conv float32"]) == {9, 25}
    # whatever was measured is what a decision asks for, with the right number of inputs
    record = gs.compress(convolution(0.1, stride=2), latency=found).layers[0]
    assert set(record.predicted) == {"dense", "sparse-conv"}


def test_timed_convolutions_have_their_forms_and_copies_are_right():
    layer = PackedConv2d.from_conv(
        nn.Conv2d(8, 16, 3, 2, 1, bias=False),
        BitmapLinear.from_matrix(timing.random_matrix(16, 72, 0.3)),
    )
    x = torch.randn(1, 8, 9, 9)
    with torch.inference_mode():
        expected = layer(x)
        copies = timing.copies(layer)
        assert len(copies) == timing._COPIES
        forms = [each._form[1] for each in copies]
        assert all(torch.equal(each(x), expected) for each in copies)
        assert all(each._form[1] is form for each, form in zip(copies, forms, strict=True))
        assert len({form.values.data_ptr() for form in forms}) == len(forms)
        copies[0].values[0] += 1  # as ever, new values make a new form
        assert not torch.equal(copies[0](x), expected)


def test_points_of_a_convolution_say_what_was_timed(monkeypatch):
    monkeypatch.setattr(measure_latency, "_seconds", lambda layers, x: 1e-9 * layers[0](x).numel())
    found = list(measure_latency.measure_convolution(16, 8, ((0.05, 1), (0.3, 4)), 5, 3, 2))
    assert [name for name, *_ in found] == [
        f"{kind}-3x3s2 float32" for kind in ("dense-conv", "sparse-conv", "tiled-conv")
    ]
    assert {(rows, shape.out, shape.inputs) for _, rows, shape, _ in found} == {(25, 16, 72)}
    assert all(seconds == pytest.approx(1e-9 * 16 * 25) for *_, seconds in found)
    assert found[2][2].high == pytest.approx(4.0) and found[1][2].high == 1


def test_threads_that_wait_for_others_end_the_calibration(cache, over_threads, monkeypatch):
    if isa_index() < 0:
        pytest.skip("the kernels are not built")
    times = {1: 1e-6, 2: 9e-6}
    monkeypatch.setattr(measure_latency, "_usual", lambda *_: times[torch.get_num_threads()])

    def calibrate():
        with pytest.raises(DisturbedError, match="2 threads took 9 us where one took 1"):
            gs.calibrate_latency()
        assert torch.get_num_threads() == 2

    over_threads(calibrate, (2,))
    assert cached_latency() is None


def test_a_result_prints_what_decided():
    text = str(gs.compress(layer(), latency=latency(), large_batches=False))
    assert "0: 256 x 512, density 0.5" in text and "by measured latencies: predicted" in text
    assert "dense: no kernel wins" in str(
        gs.compress(layer(4), latency=latency(), large_batches=False)
    )


@pytest.mark.slow
def test_predictions_hold_for_layers_that_were_not_measured():
    """On an idle machine; half of the factors are far smaller."""
    if isa_index() < 0:
        pytest.skip("the kernels are not built")
    try:
        model = gs.calibrate_latency(store=False)
    except DisturbedError as error:
        pytest.skip(str(error))
    points, factors = [], []
    zeros = ((0.06, 1), (0.2, 1), (0.2, 4))
    for out, inputs, kernel, stride in ((256, 512, 1, 1), (192, 96, 3, 1), (96, 192, 3, 2),
                                        (128, 64, 1, 2), (96, 64, 5, 1)):  # fmt: skip
        points += measure_latency.measure_convolution(out, inputs, zeros, 14, kernel, stride)
    for out, inputs in ((768, 768), (1280, 1536), (640, 2560)):
        for dtype in (torch.float32, torch.bfloat16):
            points += measure_latency.measure_dense(out, inputs, dtype, (1, 128))
            for density in (0.15, 0.5):
                points += measure_latency.measure_sparse(
                    out, inputs, density, dtype, (1, 4), (40, 128)
                )
    for name, rows, shape, seconds in points:
        predicted = model.seconds(*name.rsplit(" ", 1), rows, shape)
        factors.append(max(predicted / seconds, seconds / predicted))
    factors.sort()
    assert factors[len(factors) // 2] < 1.3 and factors[len(factors) * 3 // 4] < 1.5, factors
