"""gossamer check: the verdict of a claim in sentences, or its record."""

import json
from pathlib import Path

import pytest

from gossamer.cli import main

RECORD = Path(__file__).parents[2] / "benchmarks/results/claims/weights/rigl.json"


def test_it_runs_the_claim_and_tells_the_verdict(monkeypatch, capsys):
    calls, record = [], json.loads(RECORD.read_text())
    monkeypatch.setattr(
        "gossamer.cli.check.run", lambda *given, **named: calls.append((given, named)) or record
    )
    main(["check", "rigl", "--short"])
    printed = capsys.readouterr().out
    assert record["verdict"] in printed and len(printed.splitlines()) > len(record["promises"])
    main(["check", "rigl", "--json"])
    assert json.loads(capsys.readouterr().out) == record
    assert calls == [(("rigl", True), {"progress": True}), (("rigl", False), {"progress": True})]


@pytest.mark.parametrize(
    ("name", "message"),
    [("rigel", "did you mean 'rigl'"), ("graphkv", "no claim of 'graphkv'")],
)
def test_a_method_without_a_claim_is_one_clear_line(name, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", name])
    assert stop.value.code == 2 and message in capsys.readouterr().err
