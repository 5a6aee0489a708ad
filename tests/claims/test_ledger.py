"""Every method has a claim that was tried, its verdict follows from the figures, and its check still
runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from gossamer.methods import cards, verdicts

ROOT = Path(__file__).parents[2] / "benchmarks"
RECORDS = sorted((ROOT / "results" / "claims").glob("*.json"))
FILES = sorted(path for path in (ROOT / "claims").glob("*.py") if "def check(" in path.read_text())


def load(name):
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"claims.{name}")
    finally:
        sys.path.pop(0)


def test_every_method_has_a_record_and_a_check():
    names = {card.name for card in cards()}
    assert {path.stem for path in RECORDS} == names
    assert {path.stem for path in FILES} == names
    assert set(verdicts()) == names


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_verdict_follows_from_the_figures(path):
    ledger = load("ledger")
    found = json.loads(path.read_text())
    for variant in found["measured"].values():
        assert len(variant["seeds"]) >= 3
        assert ledger.interval(variant["seeds"])["mean"] == pytest.approx(variant["mean"])
    again = [
        ledger.promise(p["what"], p["differences"], slack=p["slack"]) for p in found["promises"]
    ]
    for key in ("met", "excluded"):
        assert [p[key] for p in again] == [p[key] for p in found["promises"]]
    assert found["verdict"] in (ledger.verdict(again), ledger.UNTESTABLE)
    assert ledger.figures(again) in found["why"]


def test_a_promise_can_fail():
    ledger = load("ledger")
    assert ledger.promise("", [1.0, 1.1, 1.2], [0.0, 0.0, 0.0])["met"]
    assert not ledger.promise("", [0.0, 0.0, 0.0], [1.0, 1.1, 1.2])["met"]
    assert not ledger.promise("", [0.0, 1.0, 0.2], 0.0)["met"], "the interval spans zero"
    assert not ledger.promise("", [0.0, 0.0, 0.0], 0.0)["met"]
    assert ledger.promise("", [-0.01, -0.01, -0.01], 0.0, slack=0.02)["met"]


def test_a_verdict_needs_an_interval_on_one_side():
    ledger = load("ledger")
    met = ledger.promise("", [1.0, 1.1, 1.2])
    undecided, excluded = (
        ledger.promise("", [0.0, 1.0, 0.2]),
        ledger.promise("", [-1.0, -1.1, -1.2]),
    )
    assert ledger.verdict([met, met]) == ledger.HOLDS
    assert ledger.verdict([met, undecided]) == ledger.UNTESTABLE
    assert ledger.verdict([met, undecided, excluded]) == ledger.FAILS
    assert ledger.verdict([ledger.promise("", [0.0, 0.0, 0.0])]) == ledger.FAILS


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_short_form_runs(path):
    found = load(path.stem).check(True)
    assert found["method"] == path.stem and found["claimed"] and found["promises"]
    assert all(len(variant["seeds"]) >= 2 for variant in found["measured"].values())
