"""What is said of the processor: its generation, and the dot products that speeds hang on."""

import builtins
import io
import json

import pytest

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
