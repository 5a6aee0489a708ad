"""Small instances of every model family go the whole path, and the page shows what came out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

HERE = Path(__file__).parent
FEW = (
    "llama", "gemma2", "mixtral", "mamba", "bert", "t5", "swin", "transformer-encoder",
    "lstm-tagger", "depthwise-conv", "shared-layer", "mlp-weight-norm",
)  # fmt: skip
sys.path.insert(0, str(HERE))
try:
    import families
    import page
    from rows import Row, Wrong

    EVERY = [family.name for family in families.every()]
finally:
    sys.path.remove(str(HERE))


def sweep(work, names):
    """The rows of these families, run in processes of their own."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "run.py"), "--work", str(work), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [Row(**json.loads((work / f"{name}.json").read_text())) for name in names]
    return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("sweep"), FEW)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("sweep"), EVERY)


@pytest.mark.parametrize("name", FEW)
def test_a_few_families_go_the_path(few, name):
    assert_sound(few[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_family_goes_the_path(every, name):
    if every[name].steps.get("build", "").startswith("skipped"):
        pytest.skip(every[name].steps["build"])
    assert_sound(every[name])


@pytest.mark.slow
def test_nearly_all_families_go_the_whole_path(every):
    done = [row for row in every.values() if not row.steps["build"].startswith("skipped")]
    assert len(done) >= 60
    assert sum(row.whole() for row in done) >= len(done) * 55 / 60


def assert_sound(row):
    """No crash, no wrong number, and something was tried."""
    assert not row.faults(), "\n".join([*row.faults().values(), *row.tracebacks.values()])
    assert sum(step.startswith("prune") for step in row.steps) == 7


def test_the_page_shows_the_record():
    made = json.loads(page.RECORD.read_text())
    assert page.PAGE.read_text() == page.render(made), "run make sweep"


def test_the_record_is_of_these_families_and_sound():
    rows = page.read()
    assert [row.name for row in rows] == EVERY, "run make sweep"
    done = [row for row in rows if not row.steps["build"].startswith("skipped")]
    assert not [row.name for row in done if row.faults()]
    assert len(done) >= 60
    assert sum(row.whole() for row in done) >= len(done) * 55 / 60


def test_a_refusal_that_names_nothing_is_wrong():
    row = Row("x", "torch.nn")
    with row.step("prune"):
        raise ValueError("no Gossamer error")
    with row.step("load"):
        raise Wrong("a number")
    with row.step("save"):
        pass
    assert row.steps == {
        "prune": "CRASH: ValueError: no Gossamer error",
        "load": "WRONG: a number",
        "save": "ok",
    }
    assert set(row.faults()) == {"prune", "load"} and not row.whole()
