"""gossamer calibrate, and where compress takes its costs from."""

import json
import subprocess
import sys

import pytest

from gossamer.cli import latency as module
from gossamer.cli import main
from gossamer.cli.latency import latency_named
from gossamer.core.errors import DisturbedError, FormatError, UsageError
from gossamer.nn.kernel_choice.latency import LatencyModel
from gossamer.nn.kernel_choice.machine import cache_file, cached_latency, known_latency, machine
from gossamer.ops._dispatch import isa_index

MADE = LatencyModel(machine(), {"dense float32": {1: (1e-6, 0.0, 1e-9, 0.0, 0.0), 128: (0.0,) * 5}})


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """An empty cache, and a calibration that takes no time; how often it ran."""
    if isa_index() < 0:
        pytest.skip("the kernels are not built")
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "calibrate_latency", lambda **_: calls.append(1) or MADE)
    return calls


def test_auto_takes_what_calibrate_kept_else_short_timings(measured, monkeypatch, capsys):
    monkeypatch.setattr("gossamer.nn.kernel_choice.machine.measure_here", lambda: "timings")
    assert known_latency(latency_named("auto")) == "timings" and not measured
    main(["calibrate"])
    assert known_latency(latency_named("auto")) == MADE == cached_latency() and len(measured) == 1
    assert "measuring" in capsys.readouterr().err
    cache_file().write_text("damaged")
    assert known_latency(latency_named("auto")) == "timings"


def test_a_busy_machine_is_one_error_and_nothing_is_kept(measured, monkeypatch):
    def busy(**_):
        raise DisturbedError("other work disturbs the measurement")

    monkeypatch.setattr(module, "calibrate_latency", busy)
    with pytest.raises(DisturbedError):
        module.measure_latency()
    assert cached_latency() is None


def test_a_cache_that_cannot_be_written_costs_a_line(measured, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level("INFO", logger="gossamer"):
        assert module.measure_latency() == MADE
    assert "cannot be kept" in caplog.text


def test_rule_or_a_file(measured, tmp_path):
    assert latency_named("rule") == "rule" and not measured
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(MADE.to_json()))
    assert latency_named(str(path)) == MADE
    path.write_text("{}")
    with pytest.raises(FormatError, match=r"costs\.json"):
        latency_named(str(path))
    with pytest.raises(UsageError, match="auto, rule or a file"):
        latency_named("fast")


def test_calibrate_prints_a_table_or_json(measured, capsys):
    main(["calibrate"])
    out = capsys.readouterr().out
    assert "dense" in out and "16.8" in out and "kept in" in out  # 1 us and 1 ns per position
    main(["calibrate", "--json"])
    assert LatencyModel.from_json(json.loads(capsys.readouterr().out)) == MADE


def test_another_process_finds_the_same_costs():
    code = "from gossamer.nn.kernel_choice.machine import cached_latency; print(cached_latency() is not None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
