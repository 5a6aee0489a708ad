"""The measurement on SmolLM2 goes on where it was stopped, with the same plan alone."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "cases" / "smollm2.py"


@pytest.fixture
def case(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("smollm2_case", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "smollm2_case", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "folder", lambda name: tmp_path)
    return module


def run(case, monkeypatch, out, *options):
    """The parts that were measured, and the record."""
    measured = []

    def apart(label, plan):
        measured.append(label)
        return {"bits_per_byte": float(len(measured))}

    monkeypatch.setattr(case, "apart", apart)
    monkeypatch.setattr("sys.argv", ["smollm2.py", "--out", str(out), *options])
    case.main()
    return measured, json.loads(out.read_text())


def test_a_stopped_run_goes_on(case, monkeypatch, tmp_path):
    out = tmp_path / "results" / "record.json"
    first, record = run(case, monkeypatch, out, "--only", "seed 0")
    once = ["magnitude, seed 0", "sparsegpt, seed 0", "wanda, seed 0"]
    assert first == once + [label.replace(",", " 2:4,") for label in once]
    rest, record = run(case, monkeypatch, out)
    assert sorted(first + rest) == sorted(case.parts()) == sorted(record["parts"])
    assert record["summary"]["sparsegpt"]["seeds"] == 3
    assert record["summary"]["sparsegpt 2:4"]["seeds"] == 3
    assert "interval95" in record["summary"]["wanda"]
    assert run(case, monkeypatch, out)[0] == []
    assert run(case, monkeypatch, out, "--plan", '{"samples": 4}', "--only", "dense")[0] == [
        "dense"
    ]
