"""Training from Python: the same figures and files as the command line gives, kill and resume."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import gossamer as gs
from gossamer.cli import main
from gossamer.testbed import Digits, digits
from gossamer.testbed.networks import mlp

pytest.importorskip("sklearn")
SAME = ("method", "pattern", "measured_density", "requested_density", "quality", "loss", "topology",
        "flops", "layers", "recipe", "steps", "seed")  # fmt: skip


def problem(batch_size=32, seed=0):
    """What `gossamer train --data digits --model mlp --width 16 --batch 32` trains."""
    return gs.ImageProblem(*digits(seed=seed), partial(mlp, (1, 8, 8), 10, 16), batch_size)


def plain(facts):
    return json.loads(json.dumps(facts))


def told(argv, capsys):
    main(["train", "--data=digits", "--model=mlp", "--width=16", "--batch=32", "--json", *argv])
    return json.loads(capsys.readouterr().out)


def test_one_run_is_what_the_command_does(tmp_path, capsys):
    out = tmp_path / "command"
    words = ["--method=rigl:every=4", "--density=0.2", "--steps=12", "--lr=0.05", f"--out={out}"]
    command = told(words, capsys)
    report = gs.measure_training(problem(), gs.weights.RigL(0.2, every=4), steps=12, lr=0.05)
    mine = plain(report.save(tmp_path / "python", labels={"method": "rigl:every=4"}))
    assert [key for key in SAME if mine[key] != command[key]] == []
    assert mine == json.loads((tmp_path / "python/result.json").read_text())
    files = [
        (tmp_path / name / "gossamer.safetensors").read_bytes() for name in ("command", "python")
    ]
    assert files[0] == files[1]
    assert "rigl:every=4 on images" in (tmp_path / "python/report.html").read_text()
    assert "accuracy" in str(report) and "rigl on images, 12 steps" in str(report)
    with pytest.raises(gs.UsageError, match="not empty"):
        report.save(tmp_path / "python")


def test_rounds_are_what_the_command_does(tmp_path, capsys):
    words = [
        "--method=imp:rounds=2,rewind=2",
        "--density=0.2",
        "--steps=6",
        f"--out={tmp_path / 'out'}",
    ]
    command = told(words, capsys)
    report = gs.measure_training(problem(), "imp:density=0.2,rounds=2,rewind=2", steps=6)
    mine = plain(report.facts)
    keys = [*SAME[1:], "densities", "steps_together"]
    assert [key for key in keys if mine[key] != command[key]] == []


def test_a_comparison_is_what_the_command_does(tmp_path, capsys):
    words = ["--sweep-methods=dense,set", "--density=0.2", "--seeds=2", "--steps=4"]
    command = told([*words, f"--out={tmp_path / 'out'}"], capsys)
    methods = {"dense": None, "set": gs.weights.SET(0.2)}
    report = gs.compare_training(problem(), methods, steps=4, seeds=2)
    mine = plain(report.save(tmp_path / "python", labels={"data": "mine"}))
    for key in ("variants", "budget_flops", "seeds", "metric"):
        assert mine[key] == command[key], key
    assert "2 ways to train on mine" in (tmp_path / "python/report.html").read_text()
    assert len(str(report).splitlines()) == 3


def test_text_is_what_the_command_does(tmp_path, capsys, tiny_llama):
    text = "".join(f"line {n} of {n * n}\n" for n in range(900)).encode()
    tiny_llama(width=32).save_pretrained(tmp_path / "lm")
    (tmp_path / "text.txt").write_bytes(text)
    main(["train", f"--data={tmp_path / 'text.txt'}", f"--model={tmp_path / 'lm'}", "--method=srste",
          "--pattern=2:4", "--steps=3", "--batch=4", "--length=16", f"--out={tmp_path / 'out'}",
          "--json"])  # fmt: skip
    command = json.loads(capsys.readouterr().out)
    cut = len(text) * 9 // 10
    model = tiny_llama(width=32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    mine = gs.TextProblem(model, text[:cut], text[cut:], batch_size=4, length=16)
    report = gs.measure_training(mine, gs.weights.SRSTE(gs.NM(2, 4)), steps=3)
    facts = plain(report.facts)
    assert [key for key in SAME if facts[key] != command[key]] == []
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def stop_after(monkeypatch, steps):
    """Make every run of `Fit` stop like a kill after so many steps; returns how to undo it."""
    from gossamer.engine.train.fit import Fit

    advance, taken = Fit._advance, []

    def counted(self):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(1)
        advance(self)

    monkeypatch.setattr(Fit, "_advance", counted)
    return lambda: monkeypatch.setattr(Fit, "_advance", advance)


@pytest.mark.parametrize("method", ["set:density=0.2,every=3", "imp:density=0.2,rounds=2", None])
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, method):
    run = partial(gs.measure_training, problem(), method, steps=8, save_every=2)
    whole = run()
    undo = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path / "state")
    undo()
    rest = run(checkpoint=tmp_path / "state")
    assert plain(rest.facts) == plain(whole.facts)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name


def test_a_stopped_comparison_keeps_its_finished_runs(tmp_path, monkeypatch):
    methods = {"static": gs.weights.StaticRandom(0.2), "set": gs.weights.SET(0.2)}
    run = partial(gs.compare_training, problem(), methods, steps=3, seeds=2)
    whole = run()
    undo = stop_after(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path / "state")
    undo()
    assert len(list((tmp_path / "state").glob("*.json"))) == 2
    assert plain(run(checkpoint=tmp_path / "state").facts) == plain(whole.facts)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run = partial(gs.measure_training, method="set:density=0.2", steps=4, checkpoint=tmp_path)
    run(problem())
    for changed in (problem(batch_size=16), problem(seed=1)):
        with pytest.raises(gs.UsageError, match=r"another run: (batch size|data)"):
            run(changed)
    with pytest.raises(gs.UsageError, match=r"another run: .*lr"):
        run(problem(), lr=0.01)


def test_the_testbed_trains_in_the_same_call():
    report = gs.measure_training(Digits(norm=True), "rigl:density=0.2,every=5", steps=60, seed=3)
    assert report.facts["data"] == "digits" and report.facts["quality"]["value"] > 0.6
    assert report.facts["measured_density"] == pytest.approx(0.2, abs=0.01)


BAD = [
    ({"method": gs.weights.Wanda()}, "is a scorer"),
    ({"method": "wanda"}, "is a scorer"),
    ({"method": "rigel:density=0.1"}, "did you mean 'rigl'"),
    ({"method": "imp:density=0.2,rewind=9"}, "rewinds to step 9"),
    ({"optimizer": "lion"}, "optimizer"),
    ({"save_every": 0}, "save_every"),
    ({"steps": 0}, "steps"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_input_is_refused_before_training(options, message, tmp_path):
    given = {"method": "set:density=0.2", "steps": 5, "checkpoint": tmp_path / "state", **options}
    with pytest.raises(gs.UsageError, match=message):
        gs.measure_training(problem(), **given)
    assert not (tmp_path / "state").exists()


def test_bad_data_is_refused(tiny_llama):
    x, y, held_x, held_y = digits()
    network = partial(mlp, (1, 8, 8), 10)
    with pytest.raises(gs.UsageError, match="with n labels"):
        gs.ImageProblem(x, y[1:], held_x, held_y, network)
    with pytest.raises(gs.UsageError, match="at most the"):
        gs.ImageProblem(x, y, held_x, held_y, network, batch_size=5000)
    with pytest.raises(gs.UsageError, match="no causal language model"):
        gs.TextProblem(mlp((1, 8, 8), 10), b"text", b"held out")
    with pytest.raises(gs.UsageError, match="512 positions"):
        gs.TextProblem(tiny_llama(), b"text " * 900, b"held out", length=600)
    with pytest.raises(gs.UsageError, match="need more text"):
        gs.TextProblem(tiny_llama(), b"text", b"held out", length=16)
    with pytest.raises(gs.UsageError, match="at least one method"):
        gs.compare_training(problem(), {})


@pytest.mark.parametrize("page", ["train-command", "testbeds"])
def test_the_python_of_the_guide_runs(page, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "guide" / f"{page}.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert "steps=300" in block
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block.replace("steps=300", "steps=3"), names)
    assert names["report"].facts["steps"] == 3
