"""gossamer bench --suite frontier: a record with scores, costs and fits, and runs that go on."""

import json

import pytest

from gossamer.attention_comparison import AttentionComparison
from gossamer.bench import frontier
from gossamer.cli import main
from gossamer.engine.measure.frontier import Point

pytest.importorskip("transformers")


@pytest.fixture
def small(monkeypatch):
    few = {"streamingllm": ("streamingllm:window=32,block=16", "streamingllm:window=96,block=16")}
    monkeypatch.setattr(frontier, "SEEDS", (0,))
    monkeypatch.setattr(frontier, "SYMBOL_SETTINGS", few)


def test_the_suite_writes_a_record_and_goes_on(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "frontier.json"
    words = ["bench", "--suite", "frontier", "--only", "symbols needle 256", "--out", str(out)]
    main(words)
    record = json.loads(out.read_text())
    assert [p["method"] for p in record["points"]] == ["dense", "streamingllm", "streamingllm"]
    assert record["points"][0]["scores"] == [record["points"][0]["score"]]
    assert set(record["at"]) == {"0.15", "0.3", "0.5"} and record["laws"] == []
    assert (tmp_path / "frontier.svg").read_text().startswith("<svg")
    assert "needle, 256 tokens, symbols" in capsys.readouterr().out
    monkeypatch.setattr(frontier, "symbol_model", lambda: 1 / 0)
    monkeypatch.setattr(frontier.Part, "load", lambda self: None)  # nothing is left to measure
    main([*words, "--resume"])
    assert json.loads(out.read_text())["points"] == record["points"]


def test_an_unknown_case_is_refused(small, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--suite", "frontier", "--only", "poems"])
    assert stopped.value.code == 2
    assert "leaves no case" in capsys.readouterr().err


def test_a_law_is_fitted_for_each_task_and_method():
    points = [
        Point("symbols", method, f"{method} {density}", "needle", length, seed, 1000,
              0.5 + 0.4 * density, density, 1.0, 1.0, 0.0, 1.0, 1.0)
        for length in (256, 512, 1024)
        for method, density in (("dense", 1.0), ("blocksparse", 0.2), ("blocksparse", 0.5))
        for seed in (0, 1)
    ]  # fmt: skip
    record = frontier.record(AttentionComparison(tuple(points), {"needle": "higher"}))
    (law,) = record["laws"]
    assert law["method"] == "blocksparse" and law["fitted"] + law["held_out"] == 9
    assert law["sparsity"] < -0.1 and law["size"] == 0
    assert len(record["points"]) == 9 and len(record["points"][0]["scores"]) == 2
