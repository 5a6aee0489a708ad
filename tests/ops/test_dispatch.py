"""What is said of the processor: its generation, and the dot products that speeds hang on."""

import builtins
import importlib
import io
import json
import logging
from types import SimpleNamespace

import pytest
from torch import nn

import gossamer as gs
from gossamer.nn.kernel_choice.machine import machine
from gossamer.ops import _dispatch

ZEN4 = """processor	: 0
cpu family	: 25
model		: 17
model name	: AMD EPYC
flags		: fpu avx2 avx512f avx512_vnni avx512_bf16

processor	: 1
model name	: another
"""
CASCADE_LAKE = """processor	: 0
cpu family	: 6
model		: 85
model name	: Intel(R) Xeon(R) Processor @ 2.50GHz
flags		: fpu avx2 avx512f avx512_vnni
"""
GRAVITON = "processor : 0\nFeatures : fp asimd asimddp bf16\n"


@pytest.mark.parametrize(
    ("text", "name", "dots"),
    [
        (ZEN4, "AMD EPYC (family 25, model 17)", (True, True)),
        (CASCADE_LAKE, "Intel(R) Xeon(R) Processor @ 2.50GHz (family 6, model 85)", (False, True)),
        (GRAVITON, None, (True, True)),
        ("processor : 0\nmodel name : plain\n", "plain", None),
    ],
)
def test_the_processor_is_named(text, name, dots, monkeypatch):
    real = builtins.open

    def fake(path, *rest, **options):
        return io.StringIO(text) if path == "/proc/cpuinfo" else real(path, *rest, **options)

    monkeypatch.setattr(_dispatch.os.path, "exists", lambda path: path == "/proc/cpuinfo")
    monkeypatch.setattr(builtins, "open", fake)
    found = _dispatch.processor()
    assert found["cpu"] == name if name else found["cpu"]
    if dots is None:
        assert set(found) == {"cpu"}, "what nobody told is not claimed"
    else:
        assert (found["bfloat16_dot"], found["int8_dot"]) == dots


def test_a_machine_survives_json():
    facts = machine()
    assert {"cpu", "isa", "threads", "torch", "gossamer"} <= set(facts)
    assert json.loads(json.dumps(facts)) == facts


@pytest.fixture
def fresh():
    """What is known of the compiled module is asked again, before and after."""
    asked = (_dispatch._found, _dispatch.kernels, _dispatch._best)
    for each in asked:
        each.cache_clear()
    yield
    for each in asked:
        each.cache_clear()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'gossamer._kernels'"), "were not built"),
        (ImportError("libgomp.so.1: cannot open shared object"), "cannot be loaded (libgomp.so.1"),
        (None, "no vector kernels for this"),
    ],
)
def test_where_no_vector_kernels_run_compress_says_so(error, said, fresh, monkeypatch, caplog):
    """Not built, not loadable, and a processor with portable code only are three different lines."""
    monkeypatch.delenv("GOSSAMER_ISA", raising=False)
    real = importlib.import_module

    def load(name, *rest):
        if name != "gossamer._kernels":
            return real(name, *rest)
        if error is not None:
            raise error
        return SimpleNamespace(best_isa=lambda: 0)

    monkeypatch.setattr(_dispatch.importlib, "import_module", load)
    with caplog.at_level(logging.WARNING, "gossamer"):
        result = gs.compress(nn.Sequential(nn.Linear(8, 8)), latency="rule")
    assert result.isa == ("portable" if error is None else "reference")
    (line,) = [record.getMessage() for record in caplog.records]
    assert said in line and "little or no time" in line


def test_nothing_is_said_of_vector_kernels_that_run_or_were_not_wanted(monkeypatch, caplog):
    if (module := _dispatch.kernels()) is None or module.best_isa() == 0:
        pytest.skip("no vector kernels here")
    for isa in ("", "portable"):
        monkeypatch.setenv("GOSSAMER_ISA", isa)
        gs.compress(nn.Sequential(nn.Linear(8, 8)), latency="rule")
    assert not caplog.records
