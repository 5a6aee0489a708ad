"""Small instances of every model family go the whole path, and the page shows what came out."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gossamer as gs

pytest.importorskip("transformers")

HERE = Path(__file__).parent
FEW = (
    "llama", "gemma2", "mixtral", "mamba", "bert", "t5", "swin", "transformer-encoder",
    "lstm-tagger", "depthwise-conv", "shared-layer", "mlp-weight-norm",
)  # fmt: skip
sys.path.insert(0, str(HERE))
try:
    import calibration
    import checks
    import page
    from families import every as every_family
    from rows import Row, Wrong

    FAMILIES = every_family()
finally:
    sys.path.remove(str(HERE))
EVERY = [family.name for family in FAMILIES]


def sweep(work, names, *options):
    """The rows of these families, run in processes of their own."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "run.py"), "--work", str(work), *options, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [Row(**json.loads((work / f"{name}.json").read_text())) for name in names]
    return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("sweep"), FEW, "--quick")


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("sweep"), EVERY)


@pytest.mark.parametrize("name", FEW)
def test_a_few_families_go_the_path(few, name):
    assert_sound(few[name], 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_family_goes_the_path(every, name):
    if every[name].steps.get("build", "").startswith("skipped"):
        pytest.skip(every[name].steps["build"])
    assert_sound(every[name], 7)


@pytest.mark.slow
def test_nearly_all_families_go_the_whole_path(every):
    done = [row for row in every.values() if not row.steps["build"].startswith("skipped")]
    assert len(done) >= 60
    assert sum(row.whole() for row in done) >= len(done) * 55 / 60


def assert_sound(row, ways):
    """No crash, no wrong number, and something was tried."""
    assert not row.faults(), "\n".join([*row.faults().values(), *row.tracebacks.values()])
    assert sum(step.startswith("prune") for step in row.steps) == ways


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


def test_an_outcome_says_what_happened():
    row = Row("x", "torch.nn")
    with row.step("prune"):
        raise ValueError("not one of ours")
    with row.step("load"):
        raise Wrong("a number")
    with row.step("export"):
        raise gs.UsageError("layer 3")
    with row.step("save"):
        pass
    with row.step("save", None):
        raise Wrong("the second time")
    assert row.steps == {
        "prune": "CRASH: ValueError: not one of ours",
        "load": "WRONG: a number",
        "export": "refused: layer 3",
        "save": "WRONG: the second time",
    }
    assert set(row.faults()) == {"prune", "load", "save"} and not row.whole()


@pytest.fixture
def pruned():
    """A perceptron with its state before, and the honest result of pruning it."""
    family = next(family for family in FAMILIES if family.name == "mlp")
    model = family.make()
    before = checks.snapshot(model)
    return (
        model,
        before,
        gs.prune(model, gs.weights.Magnitude(), pattern=gs.NM(2, 4), exclude=["4"]),
    )


def look(model, before, result):
    checks.restored(model, before)
    checks.pruned_weights(model, before, result, "2:4", 0.5)
    checks.coverage(model, result)


def test_an_honest_result_passes(pruned):
    look(*pruned)


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lambda m: m[0].weight[0].fill_(1.0), "0: told"),
        (lambda m: m[2].weight.copy_(m[2].weight.roll(2, 1)), "a group of four"),
        (lambda m: m[0].bias.add_(1.0), "0.bias changed"),
        (lambda m: m[0].train(), "training of 0"),
        (lambda m: m[0].register_forward_hook(print), "hooks of 0"),
        (lambda m: m[0].bias.requires_grad_(False), "grad of 0.bias"),
    ],
)
def test_a_changed_model_is_seen(pruned, tamper, told):
    with torch.no_grad():
        tamper(pruned[0])
    with pytest.raises(Wrong, match=told):
        look(*pruned)


@pytest.mark.parametrize("what", ["total", "matrices", "pruned", "nonzero"])
def test_a_wrong_count_is_seen(pruned, what):
    model, before, result = pruned
    told = replace(result.coverage, **{what: getattr(result.coverage, what) + 1})
    with pytest.raises(Wrong, match=f"coverage.{what}"):
        look(model, before, replace(result, coverage=told))


def test_a_wrong_density_and_a_silent_leftover_are_seen(pruned):
    model, before, result = pruned
    with pytest.raises(Wrong, match="the weights keep"):
        look(model, before, replace(result, measured_density=0.4))
    with pytest.raises(Wrong, match="left out of"):
        look(model, before, replace(result, coverage=replace(result.coverage, left_out=())))


def test_a_refusal_must_name_a_layer_and_change_nothing(pruned):
    model, before, _ = pruned
    with pytest.raises(Wrong, match="changed before the refusal"):
        checks.refused_well(model, before, "0: cannot be pruned")
    now = checks.snapshot(model)
    checks.refused_well(model, now, "Sequential has no layer to prune")
    with pytest.raises(Wrong, match="names no layer"):
        checks.refused_well(model, now, "this cannot be pruned")


def test_a_gap_is_seen():
    right = {"out": torch.tensor([1.0, -2.0])}
    assert checks.gap({"out": torch.tensor([1.0, -2.0 + 1e-5])}, right, 1e-4) < 1e-5
    for wrong in ([1.0, -2.1], [1.0, float("nan")], [1.0]):
        with pytest.raises(Wrong):
            checks.gap({"out": torch.tensor(wrong)}, right, 1e-4)
    with pytest.raises(Wrong):
        checks.gap({}, right, 1e-4)


def test_another_choice_than_wandas_is_seen():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    calibration.ranked("a", scores, torch.tensor([[False, False, True, True]]))
    with pytest.raises(Wrong, match="a: 1 of 1 rows"):
        calibration.ranked("a", scores, torch.tensor([[False, True, False, True]]))
