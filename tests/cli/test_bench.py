"""gossamer bench: limits that are real, no speed for a wrong kernel, JSON that says what it is."""

import dataclasses
import importlib.util
import itertools
import json
import os

import pytest
import torch

from gossamer.bench import (
    active,
    attention,
    attention_case,
    attention_decode,
    baselines,
    conv,
    decode,
    kernels,
    llama_cpp,
    measure,
    nm,
    spgemm,
    training,
)
from gossamer.bench.measure import Limits, Turns, interleaved, measure_limits
from gossamer.cli import bench, main
from gossamer.cli.bench import _improve, describe
from gossamer.core.errors import GossamerError
from gossamer.engine.serve import decoder
from gossamer.engine.serve.compress import compress
from gossamer.nn import BitmapLinear, NMLinear, QuantizedLinear
from gossamer.nn.kernel_choice import timing
from gossamer.ops import _dispatch
from gossamer.ops._dispatch import ISAS, isa
from gossamer.ops._dispatch import kernels as compiled

if compiled() is None:
    pytest.skip("the kernels are not built", allow_module_level=True)
LIMITS = Limits(read=1e10, flops=1e11, threads=1)


def test_limits_are_of_this_machine():
    limits = measure_limits(megabytes=64)
    assert 1e9 < limits.read < 1e12 and 1e9 < limits.flops < 1e14
    assert limits.seconds(limits.read, 0.5 * limits.flops) == (1.0, "bytes")
    assert limits.seconds(0.5 * limits.read, limits.flops) == (1.0, "flops")


def test_turns_alternate():
    seen = []
    interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    order = [name for at, name in enumerate(seen) if at == 0 or seen[at - 1] != name]
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("batch", [1, 16])
def test_a_case_holds_every_engine(batch):
    found = kernels.measure(kernels.Case(96, 130, "bfloat16", 0.5, batch), LIMITS, rounds=1)
    times = found["milliseconds"]
    assert {"gossamer", "torch dense float32", "torch csr float32"} <= set(times)
    dense = min(t for name, t in times.items() if "dense" in name)
    assert found["ratio"] == pytest.approx(dense / times["gossamer"])
    assert found["limit"] in ("bytes", "flops")


def test_a_case_of_blocks():
    case = kernels.Case(64, 130, "float32", 0.5, 16, "16x1")
    matrix = kernels._matrix(case)
    tiles = (matrix != 0).view(4, 16, 130).long().sum(1)
    assert set(tiles.unique().tolist()) == {0, 16}
    assert kernels.measure(case, LIMITS, rounds=1)["ratio"] > 0
    assert describe(vars(case)).endswith("batch 16 block 16x1")


def test_our_kernels_for_older_processors_take_turns(monkeypatch):
    if isa() != "avx512":
        pytest.skip("this processor is one of them, or older")
    seen, right = [], BitmapLinear.forward
    monkeypatch.setattr(
        BitmapLinear, "forward", lambda self, x: (seen.append(isa()), right(self, x))[1]
    )
    found = kernels.measure(kernels.Case(64, 64, "float32", 0.5, 16), LIMITS, rounds=1)
    assert set(seen) == {"avx512", "avx2"} and isa() == "avx512"
    assert "gossamer avx2" in found["milliseconds"] and "dense" in found["best_dense"]
    with monkeypatch.context() as forced:
        forced.setenv("GOSSAMER_ISA", "avx512")
        kernels.measure(kernels.Case(64, 64, "float32", 0.5, 16), LIMITS, rounds=1)
        assert os.environ["GOSSAMER_ISA"] == "avx512"


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    right = BitmapLinear.forward
    monkeypatch.setattr(BitmapLinear, "forward", lambda self, x: right(self, x) + 1)
    with pytest.raises(GossamerError, match="gossamer is wrong"):
        kernels.measure(kernels.Case(64, 64, "float32", 0.5, 1), LIMITS, rounds=1)


def test_training_suite(monkeypatch, capsys):
    monkeypatch.setattr(training, "cases", lambda: [training.Case(128, 2, 0.1, 20)])
    main(["bench", "--patience=0", "--suite=training", "--repeats=1", "--json"])
    case = json.loads(capsys.readouterr().out)["cases"][0]
    times = case["milliseconds"]
    assert len(times) == 3 and case["best_dense"] in times
    assert case["ratio"] == pytest.approx(times[case["best_dense"]] / times["gossamer"])
    main(["bench", "--patience=0", "--suite=training", "--repeats=1"])
    assert "2 layers 128x128" in capsys.readouterr().out
    right = training.csr.linear
    monkeypatch.setattr(training.csr, "linear", lambda *args: 1.1 * right(*args))
    with pytest.raises(GossamerError, match="gradient is wrong"):
        training.measure(training.cases()[0], LIMITS, rounds=1)


@pytest.mark.parametrize("name", ["columns", "mlp by product", "mlp by gate"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_active_cases(name, dtype):
    case = active.Case(f"{name} small", 48, 130, dtype, 0.5)
    found = active.measure(case, LIMITS, rounds=1)
    assert found["milliseconds"]["gossamer"] > 0 and "dense" in found["best_dense"]
    assert any(case.name.startswith(name) for case in active.cases())


def test_active_suite_refuses_a_wrong_kernel(monkeypatch):
    right = active.active.linear
    monkeypatch.setattr(active.active, "linear", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(GossamerError, match="gossamer is wrong"):
        active.measure(active.Case("columns small", 48, 130, "float32", 0.5), LIMITS, rounds=1)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("pattern", ["2:4", "1:16"])
def test_nm_cases(batch, pattern, monkeypatch):
    case = nm.Case(f"{pattern} small", 48, 192, pattern, "bfloat16", batch)
    found = nm.measure(case, LIMITS, rounds=1)
    assert {"gossamer", "gossamer bitmap", "torch dense float32"} <= set(found["milliseconds"])
    assert "dense" in found["best_dense"] and found["bytes"] > 0
    right = NMLinear.forward
    monkeypatch.setattr(NMLinear, "forward", lambda self, x: 1.1 * right(self, x))
    with pytest.raises(GossamerError, match="gossamer is wrong"):
        nm.measure(case, LIMITS, rounds=1)


@pytest.mark.parametrize("power_law", [False, True])
def test_spgemm_cases(power_law, monkeypatch):
    case = spgemm.Case("small", 300, 5, power_law, True)
    found = spgemm.measure(case, LIMITS, rounds=1)
    assert {"gossamer", "scipy csr", "torch csr"} == set(found["milliseconds"])
    assert 300 <= found["case"]["edges"] <= 1500 + 300
    right = spgemm.spgemm.multiply

    def wrong(*args):
        row_ptr, columns, values = right(*args)
        return row_ptr, columns, values + 1

    monkeypatch.setattr(spgemm.spgemm, "multiply", wrong)
    with pytest.raises(GossamerError, match="gossamer is wrong"):
        spgemm.measure(case, LIMITS, rounds=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_cases(dtype, monkeypatch):
    monkeypatch.setattr(attention, "_flex", lambda *given: None)  # compiling takes half a minute
    for more in ({"causal": True}, {"backward": True}, {}):
        case = attention_case.Case("small", 192, 16, dtype, 0.3, **more)
        found = attention.measure(case, LIMITS, rounds=1)
        assert {"gossamer", "sdpa dense"} <= set(found["milliseconds"])
        assert found["of_ideal"] == pytest.approx(found["ratio"] * found["density"])
        assert found["limit"] == "flops" and 0.3 < found["density"] < 0.8
    one = attention_case.Case("one", 512, 64, dtype, 1 / 16, 4, 2, page=16)
    found = attention.measure(one, LIMITS, rounds=1)
    assert found["limit"] == "bytes" and found["density"] == 1 / 16
    assert found["of_gather"] == pytest.approx(
        found["milliseconds"]["gather"] / found["milliseconds"]["gossamer"]
    )
    for chooser, page in (("quest", 16), ("doublesparsity", 1)):
        of = attention_case.Case("of", 512, 64, dtype, 1 / 16, 4, 2, page=page, chooser=chooser)
        assert attention.measure(of, LIMITS, rounds=1)["ratio"] > 0
    packed = attention_case.Case("tiles", 512, 64, dtype, 1.0, 6, 2, kept=0.3)
    found = attention.measure(packed, LIMITS, rounds=1)
    assert 0.5 < found["memory"] < 0.8 and found["tail"] == 192  # of 512 tokens 192 are the tail
    for module, name, at in ((attention, "attention", case), (attention_decode, "decode", one)):
        right = getattr(module, name)

        def wrong(query, *given, right=right, **more):
            output, lse = right(query, *given, **more)
            return output * (1.0 if query.dtype == torch.float64 else 1.5), lse

        monkeypatch.setattr(module, name, wrong)
        with pytest.raises(GossamerError, match="gossamer is wrong"):
            attention.measure(at, LIMITS, rounds=1)


def test_onnxruntime_computes_the_same_attention(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(attention, "_flex", lambda *given: None)
    case = attention_case.Case("small", 192, 16, "float32", 0.3)
    found = attention.measure(case, LIMITS, rounds=1)
    assert "onnxruntime dense" in found["milliseconds"]


def test_conv_case(monkeypatch):
    monkeypatch.setattr(conv, "WIDTHS", [(8, 24, 1), (24, 40, 2)])
    found = conv.measure(conv.Case("small", 32, 0.1, 2), LIMITS, rounds=1)
    assert {"gossamer", "torch dense contiguous"} <= set(found["milliseconds"])
    assert found["fraction_of_limit"] > 0 and found["limit"] == "flops"
    single = conv.measure(conv.Case("layer", 9, 0.3, 1, 16, 4), LIMITS, rounds=1)
    assert single["served"] and single["ratio"] > 0
    assert not conv.measure(conv.Case("layer", 9, 0.5, 1, 16), LIMITS, rounds=1)["served"]

    def wrong(model, **options):
        model[0].bias.data.add_(1)
        return compress(model, **options)

    monkeypatch.setattr(conv, "compress", wrong)
    with pytest.raises(GossamerError, match="gossamer is wrong"):
        conv.measure(conv.Case("small", 32, 0.1, 2), LIMITS, rounds=1)


def test_decode_suite(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr(llama_cpp, "missing", lambda: "llama.cpp is not compared")
    small = decode.Geometry(64, 1, 4, 2, 128, 32000)
    monkeypatch.setitem(decode.GEOMETRIES, "llama-1b", small)
    out = tmp_path / "bench.json"
    main(["bench", "--patience=0", "--suite=decode", "--repeats=1", f"--out={out}", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    case = printed["cases"][0]
    assert case["loop"] == "compiled" and case["tokens_per_second"]["gossamer"] > 0
    main(["bench", "--patience=0", "--suite=decode", "--repeats=1"])
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--suite=speed", "decode, active, nm, spgemm, conv"),
        ("--repeats=0", "at least 1"),
        ("--only=zz", "no case"),
    ],
)
def test_bad_options(flag, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", flag])
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_matrix_has_the_density_asked_for():
    matrix = kernels._matrix(kernels.Case(200, 300, "float32", 0.2, 1))
    assert float((matrix != 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(matrix, kernels._matrix(kernels.Case(200, 300, "float32", 0.2, 1)))


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_integer_cases(dtype, density, monkeypatch):
    case = kernels.Case(128, 256, dtype, density, 1)
    found = kernels.measure(case, LIMITS, rounds=1)
    assert found["milliseconds"]["gossamer"] > 0 and "dense" in found["best_dense"]
    times = found["milliseconds"]
    assert found["ratios"] == {
        name: pytest.approx(taken / times["gossamer"])
        for name, taken in times.items()
        if name != "gossamer"
    }
    assert "torch dense int4" in times
    if importlib.util.find_spec("onnxruntime"):
        assert {"onnxruntime dense int8", "onnxruntime dense int4"} <= set(times)
    right = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: 1.1 * right(self, x))
    with pytest.raises(GossamerError, match="gossamer is wrong"):
        kernels.measure(case, LIMITS, rounds=1)


def test_decode_against_llama_cpp(monkeypatch, capsys, tmp_path):
    for name in ("llama_cpp", "gguf", "transformers"):
        pytest.importorskip(name)
    small = decode.Geometry(64, 1, 4, 2, 128, 32000)
    monkeypatch.setitem(decode.GEOMETRIES, "llama-1b", small)
    monkeypatch.setattr(llama_cpp, "PROMPT", 32)
    monkeypatch.setattr(llama_cpp, "STEPS", 2)
    argv = ["bench", "--patience=0", "--suite=decode", "--repeats=1", f"--work={tmp_path}"]
    main([*argv, "--json"])
    first, *classes = json.loads(capsys.readouterr().out)["cases"]
    assert [case["case"]["baseline"] for case in classes] == [
        f"llama.cpp {each.baseline}" for each in llama_cpp.CLASSES
    ]
    assert "baseline" not in first["case"]
    for case in classes:
        baseline, times = case["best_dense"], case["tokens_per_second"]
        assert case["ratio"] == pytest.approx(times["gossamer"] / times[baseline])
        assert case["prompt_ratio"] > 0 and 0 < case["fraction_of_limit"] < 10
        assert case["file_bytes"]["gossamer"] > 0
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.gguf")}
    main(argv)  # what was written is used again
    assert "prompt" in capsys.readouterr().out and len(written) == 3
    assert written == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.gguf")}
    right = decoder.Decoder.step
    monkeypatch.setattr(decoder.Decoder, "step", lambda self, token: 2 * right(self, token))
    with pytest.raises(GossamerError, match="decoding is wrong"):
        llama_cpp.measure(tmp_path / "llama-1b", "llama-1b", llama_cpp.CLASSES[0], LIMITS, 1)


def test_a_peer_that_is_missing_costs_a_line(monkeypatch):
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    assert "gossamer[baselines]" in llama_cpp.missing()


def test_a_wrong_integer_peer_gets_no_speed(monkeypatch):
    pytest.importorskip("onnxruntime")
    right = kernels.integer_baselines.onnx_int4

    def wrong(weights, x):
        call = right(weights, x)
        return lambda: 1.5 * call()

    monkeypatch.setattr(kernels.integer_baselines, "onnx_int4", wrong)
    with pytest.raises(GossamerError, match="onnxruntime dense int4 is wrong"):
        kernels.measure(kernels.Case(64, 300, "int4", 0.5, 1), LIMITS, rounds=1)


def test_the_calmest_measurement_counts_whatever_it_says(monkeypatch):
    states = iter([0.5, 0.6, 0.9, 1.0, 0.95])  # waits twice, then before, after of one measurement
    monkeypatch.setattr(measure, "calm", lambda peak: next(states))
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    assert measure.when_calm(lambda: {"ratio": 1.0}, 60) == {"ratio": 1.0, "calm": 0.9}
    states = iter([0.9, 0.5, 0.9, 0.7, 0.9, 0.6])  # disturbed each time: three tries, no more
    ratios = iter([3.0, 1.0, 2.0])
    assert measure.when_calm(lambda: {"ratio": next(ratios)}, 60) == {"ratio": 1.0, "calm": 0.7}
    states = iter([0.4, 0.3])
    assert measure.when_calm(lambda: {"ratio": 2.0}, 0) == {"ratio": 2.0, "calm": 0.3}


def test_calm_is_a_share_of_what_could_be():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert 0.5 < measure.calm() <= 1.0
        torch.set_num_threads(2)
        assert 0 < measure.calm() <= 1.0
        assert measure.calm(1e15) < 0.01
    finally:
        torch.set_num_threads(before)
    with pytest.raises(SystemExit):
        main(["bench", "--patience=-1"])


def test_a_stopped_run_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    """Killed in the third case: two are on disk, and only the third is measured by the next run."""
    cases = [nm.Case(f"2:4 case {k}", 48, 192, "2:4", "bfloat16", 1) for k in range(3)]
    monkeypatch.setattr(nm, "cases", lambda: cases)
    seen = []

    def timed(case, limits, rounds):
        seen.append(case.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"case": vars(case), "ratio": 1.0, "limit": "bytes", "fraction_of_limit": 0.5}

    monkeypatch.setattr(nm, "measure", timed)
    out = tmp_path / "nm.json"
    argv = ["bench", "--suite=nm", "--patience=0", f"--out={out}", "--json"]
    with pytest.raises(SystemExit):
        main(argv)
    assert len(json.loads(out.read_text())["cases"]) == 2
    main([*argv, "--resume"])
    record = json.loads(out.read_text())
    assert seen == ["2:4 case 0", "2:4 case 1", "2:4 case 2", "2:4 case 2"]
    assert [one["label"] for one in record["cases"]] == [describe(vars(case)) for case in cases]
    assert [path.name for path in tmp_path.iterdir()] == ["nm.json"]


@pytest.mark.parametrize("before", [LIMITS.read / 2, LIMITS.read * 2])
def test_cases_of_two_runs_are_judged_by_the_same_limits(before, monkeypatch, tmp_path):
    """Both cases take one second for 1e9 bytes: whichever run measured more bandwidth counts."""
    monkeypatch.setattr(
        nm, "cases", lambda: [nm.Case(f"case {k}", 48, 192, "2:4", "bfloat16", 1) for k in (0, 1)]
    )

    def timed(case, limits, rounds):
        share = 1e9 / limits.read
        return {"case": vars(case), "ratio": 1.0, "limit": "bytes", "fraction_of_limit": share}

    monkeypatch.setattr(nm, "measure", timed)
    out = tmp_path / "nm.json"
    argv = ["bench", "--suite=nm", "--patience=0", f"--out={out}", "--json"]
    for limits, only in ((before, "case 0"), (LIMITS.read, "case")):
        found = Limits(limits, LIMITS.flops, torch.get_num_threads())
        monkeypatch.setattr(bench, "measure_limits", lambda found=found, **_: found)
        main([*argv, f"--only={only}", "--resume"])
    shares = [case["fraction_of_limit"] for case in json.loads(out.read_text())["cases"]]
    assert shares == pytest.approx([1e9 / max(before, LIMITS.read)] * 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "no record"),
        ("[]", "no record"),
        ('{"cases": []}', "measured with suite"),
        (json.dumps({"suite": "nm", "kernels": _dispatch.describe(), "cases": []}), "machine"),
    ],
)
def test_resume_refuses_what_it_cannot_continue(content, message, tmp_path, capsys):
    out = tmp_path / "record.json"
    out.write_text(content)
    with pytest.raises(SystemExit):
        main(["bench", "--suite=nm", "--patience=0", f"--out={out}", "--resume"])
    assert message in capsys.readouterr().err and out.read_text() == content
    with pytest.raises(SystemExit):
        main(["bench", "--suite=nm", "--resume"])
    assert "--out" in capsys.readouterr().err


def test_a_record_says_how_calm_it_was():
    turns = Turns({"gossamer": 1.0, "slow dense": 4.0, "fast dense": 2.0, "csr": 1.5}, 0.4)
    case = training.Case(128, 2, 0.1, 20)
    found = turns.record(case, (0.5, "bytes"))
    assert (
        found["calm"] == 0.4 and found["fraction_of_limit"] == 0.5 and found["case"] == vars(case)
    )
    assert (found["best_dense"], found["ratio"]) == ("fast dense", 2.0)
    assert turns.record(case, (0.5, "bytes"), rivals="csr")["ratio"] == 1.5
    assert "calm" not in Turns(turns.seconds, None).record(case, (0.5, "bytes"))


def test_resume_measures_disturbed_cases_again(monkeypatch, tmp_path, capsys):
    shares = {"a": iter([0.9]), "b": iter([0.3, 0.2, 0.95]), "c": iter([0.5, 0.7, 0.6])}
    times = {label: itertools.count(1) for label in shares}
    here = dataclasses.replace(LIMITS, threads=torch.get_num_threads())
    monkeypatch.setattr(bench, "measure_limits", lambda patience=0.0: here)

    def measured(case, limits, rounds):
        turns = Turns({"gossamer": next(times[case.name]), "dense": 9.0}, next(shares[case.name]))
        return turns.record(case, (0.5, "bytes"))

    monkeypatch.setattr(
        active, "cases", lambda: [active.Case(n, 8, 8, "int8", 0.5) for n in shares]
    )
    monkeypatch.setattr(active, "measure", measured)
    out = tmp_path / "active.json"

    def calm():
        main(["bench", "--suite=active", f"--out={out}", "--resume"])
        found = json.loads(out.read_text())["cases"]
        return {c["label"]: (c["calm"], c["milliseconds"]["gossamer"] / 1e3) for c in found}

    assert calm() == {"a": (0.9, 1), "b": (0.3, 1), "c": (0.5, 1)}
    assert "2 of 3 cases" in capsys.readouterr().err
    assert calm() == {"a": (0.9, 1), "b": (0.3, 1), "c": (0.7, 2)}
    assert calm() == {"a": (0.9, 1), "b": (0.95, 3), "c": (0.7, 2)}
    assert "1 of 3 cases" in capsys.readouterr().err


def test_disturbed_rounds_do_not_count_whatever_they_say(monkeypatch):
    states = iter([1.0, 0.9, 0.2, 0.9, 0.95])  # before the first round, then after each
    monkeypatch.setattr(measure, "calm", lambda peak: next(states))
    times = iter([9.0, 1.0, 0.1, 7.0, 3.0])  # warm-up, calm, disturbed twice, calm
    monkeypatch.setattr(measure, "_turn", lambda call: next(times))
    assert interleaved({"one": str}, measure.Repeats(2, patience=60)) == Turns({"one": 2.0}, 0.9)
    states, times = iter([0.1, 0.2, 0.6, 0.7]), iter([9.0, 1.0, 2.0, 3.0])
    clock = iter([0.0, 1.0, 2.0, 99.0, 100.0])  # patience ends with the third round
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    assert interleaved({"one": str}, measure.Repeats(1, patience=60)) == Turns({"one": 3.0}, 0.6)


def test_the_better_limits_count():
    cases = [
        {"limit": "bytes", "fraction_of_limit": 1.0},
        {"limit": "flops", "fraction_of_limit": 0.5},
    ]
    record = {"limits": {"read": 10.0, "flops": 100.0, "threads": 2}, "cases": cases}
    _improve(record, Limits(20.0, 50.0, 2))
    assert record["limits"] == {"read": 20.0, "flops": 100.0, "threads": 2}
    assert [case["fraction_of_limit"] for case in cases] == [0.5, 0.5]


def test_limits_of_a_disturbed_machine_are_measured_again(monkeypatch, over_threads):
    """The first says 60 of 100 possible flops, the second comes while others work, then all is well."""
    found = iter([Limits(9.0, 60.0, 2), Limits(8.0, 70.0, 2), Limits(7.0, 96.0, 2)])
    rates = iter([100.0, 50.0, 50.0, 60.0, 50.0, 96.0, 50.0, 50.0])
    monkeypatch.setattr(measure, "_best_of_five", lambda megabytes: next(found))
    for place in (measure, timing):
        monkeypatch.setattr(place, "rate", lambda threads: next(rates))
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    assert over_threads(lambda: measure_limits(patience=60), (2,)) == [Limits(9.0, 96.0, 2)]
    assert next(rates, None) is None


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_our_own_dense_product_is_right(isa, rows, monkeypatch):
    if ISAS.index(isa) > compiled().best_isa():
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    weights, x = [torch.randn(rows, 192).bfloat16() for _ in range(2)], torch.randn(1, 192)
    run = baselines.own_dense_bfloat16(weights, x)
    for weight in (*weights, weights[0]):
        expected = (x @ weight.float().t()).bfloat16()
        torch.testing.assert_close(run(), expected, rtol=1e-2, atol=1e-2)
    assert baselines.own_dense_bfloat16(weights, torch.randn(2, 192)) is None
    assert baselines.torch_bsr(weights, x, "16x1") is None
