"""Every method has a claim that was tried, its verdict follows from the figures, and its check still
runs."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest

import gossamer as gs
import gossamer.claims
from gossamer.claims import load, run, write
from gossamer.claims.ledger import (
    FAILS,
    HOLDS,
    LOOKS,
    MET,
    NOT_MET,
    UNDECIDED,
    UNTESTABLE,
    Claim,
    Promise,
    check,
    confidence,
    judged,
    outcome,
    promise,
    record,
    seeds_to_decide,
    summary,
    verdict,
)
from gossamer.core.confidence import interval
from gossamer.core.errors import UsageError
from gossamer.methods import cards, methods, verdicts

ROOT = Path(__file__).parents[2] / "benchmarks" / "results" / "claims"
RECORDS = sorted(ROOT.glob("*/*.json"))
NOT_TRIED = {
    name
    for name, method in methods().items()
    if "claim was not tried" in " ".join(sys.modules[method.__module__].__doc__.split())
}
"""Methods whose pages say that their claim waits for its check or its record."""
NAMES = sorted({f"{card.topic}.{card.name}" for card in cards()} - NOT_TRIED)
ONCE = (3,)


def test_every_method_has_a_record_and_a_check():
    assert sorted(f"{path.parent.name}.{path.stem}" for path in RECORDS) == NAMES
    assert sorted(verdicts()) == NAMES
    for name in NAMES:
        assert load(name).method.card.name == name.partition(".")[2]


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_verdict_follows_from_the_figures(path):
    found = json.loads(path.read_text())
    seeds, looks = found["seeds"]["run"], found["seeds"]["looks"]
    claim = load(f"{path.parent.name}.{path.stem}")
    assert seeds in looks and looks == list(claim.looks) and seeds >= 3
    for variant in found["measured"].values():
        assert len(variant["seeds"]) == seeds
        assert interval(variant["seeds"]) == pytest.approx((variant["mean"], variant["ci95"]))
    figures = {name: variant["seeds"] for name, variant in found["measured"].items()}
    again = record(claim, figures, [judged(p, looks) for p in claim.promises(figures)], looks)
    assert again == {key: found[key] for key in again}
    if seeds < looks[-1]:
        assert found["verdict"] != UNDECIDED


def test_a_promise_can_fail():
    def came(more, less=0.0, slack=0.0):
        return judged(promise("", "quality", more, less, slack), ONCE)["outcome"]

    assert came([1.0, 1.1, 1.2], [0.0, 0.0, 0.0]) == MET
    assert came([0.0, 0.0, 0.0], [1.0, 1.1, 1.2]) == NOT_MET
    assert came([0.0, 1.0, 0.2]) == UNDECIDED, "the interval spans zero"
    assert came([0.0, 0.0, 0.0]) == NOT_MET, "equal is not above"
    assert came([-0.01, -0.01, -0.01], slack=0.02) == MET


def test_a_verdict_needs_an_interval_on_one_side():
    met, undecided, excluded = (
        {"outcome": judged(promise("", "quality", values), ONCE)["outcome"]}
        for values in ([1.0, 1.1, 1.2], [0.0, 1.0, 0.2], [-1.0, -1.1, -1.2])
    )
    untestable = judged(Promise("", "quality", reason="too small a model"), ONCE)
    assert verdict([met, met]) == HOLDS
    assert verdict([met, undecided]) == UNDECIDED
    assert verdict([met, undecided, excluded]) == FAILS
    assert verdict([met, untestable]) == HOLDS
    assert verdict([untestable]) == UNTESTABLE
    assert outcome(untestable) == "not testable here: too small a model"


def test_what_cannot_be_tested_needs_a_reason():
    for broken in ({}, {"reason": "so", "differences": (1.0, 2.0)}, {"slack": -1.0, "reason": "x"}):
        with pytest.raises(UsageError, match="needs either differences or a reason"):
            Promise("a line", "quality", **broken)


def test_the_record_says_what_became_without_the_slack():
    line = judged(promise("", "quality", [0.01, -0.01, 0.005], slack=0.1), ONCE)
    assert (line["outcome"], line["without_slack"]) == (MET, UNDECIDED)
    assert outcome(line) == "met, slack 0.1 (without it: undecided)"
    assert "without_slack" not in judged(promise("", "quality", [1.0, 1.1, 1.2]), ONCE)


def test_the_estimate_of_seeds_would_decide():
    def spread(seeds):
        """So many values of mean 0.3 and standard deviation 1."""
        scale = stdev(range(seeds))
        return [0.3 + (x - (seeds - 1) / 2) / scale for x in range(seeds)]

    needed = seeds_to_decide(promise("", "quality", spread(5)), LOOKS)
    assert needed > 5
    for seeds, expected in ((needed, MET), (needed - 1, UNDECIDED)):
        line = judged(promise("", "quality", spread(seeds)), LOOKS)
        assert line["outcome"] == expected
    assert seeds_to_decide(promise("", "quality", [1.0, -1.0]), LOOKS) is None


def claim(figures, looks=LOOKS):
    return Claim(
        gs.weights.RigL,
        "Above zero.",
        "Nowhere.",
        lambda seed, short: {"a": figures(seed)},
        lambda found: [promise("above zero", "quality", found["a"])],
        looks,
    )


def test_seeds_are_added_until_every_line_is_decided():
    plain = check(claim(lambda seed: 1.0 + seed % 2 / 100))
    assert (plain["seeds"]["run"], plain["verdict"]) == (5, HOLDS)
    late = check(claim(lambda seed: -1.0 if seed == 0 else 1.0))
    assert (late["seeds"]["run"], late["verdict"]) == (10, HOLDS)
    never = check(claim(lambda seed: (-1.0) ** seed))
    assert (never["seeds"]["run"], never["verdict"]) == (20, UNDECIDED)
    assert "more than 1000 seeds" in outcome(never["promises"][0])
    assert check(claim(float), short=True)["seeds"]["run"] == 2


def test_several_looks_err_no_more_often_than_one():
    """Where a promise is false by nothing, looking three times decides it at most 5% of the time."""
    generator = random.Random(0)
    wrong = plain = 0
    for _ in range(1500):
        values = [generator.gauss(0, 1) for _ in range(20)]
        looks = [values[:count] for count in LOOKS]
        wrong += any(abs(x.mean) > x.half for x in (interval(v, confidence(LOOKS)) for v in looks))
        plain += any(abs(x.mean) > x.half for x in map(interval, looks))
    assert wrong / 1500 <= 0.05 < plain / 1500


def test_a_claim_runs_by_name_and_is_written_under_its_topic(tmp_path, monkeypatch):
    monkeypatch.setattr(gossamer.claims, "load", lambda name: claim(float))
    path = write(run("rigl"), tmp_path)
    assert path == tmp_path / "weights" / "rigl.json"
    assert json.loads(path.read_text())["topic"] == "weights"


def test_a_record_reads_as_sentences():
    first, line = summary(check(claim(lambda seed: (-1.0) ** seed)))
    assert first.startswith("rigl: undecided. 20 seeds. The figures were judged after 5, 10 and 20")
    assert line.startswith("quality, above zero: +0.0000 ± ") and "undecided (more than" in line


def test_an_unknown_claim_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="did you mean 'rigl'"):
        run("rigll")
    monkeypatch.setattr(gossamer.claims, "find_spec", lambda path: None)
    with pytest.raises(UsageError, match=r"gossamer\.claims\.weights\.rigl"):
        run("rigl")


def test_threads_are_restored():
    import torch

    before = torch.get_num_threads()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gossamer.claims,
            "load",
            lambda name: replace(
                claim(lambda seed: seen.append(torch.get_num_threads()) or 1.0), threads=1
            ),
        )
        run("rigl", short=True)
    assert seen == [1, 1] and torch.get_num_threads() == before


def test_one_short_form_runs_with_all_tests():
    found = run("snip", short=True)
    assert set(found["measured"]) == {"dense", "SNIP", "random, ERK"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_runs(name):
    found = run(name, short=True)
    assert f"{found['topic']}.{found['method']}" == name
    assert found["claimed"] and found["promises"] and found["seeds"]["run"] == 2
