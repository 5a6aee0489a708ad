"""The whole path from Python: the same figures and files as the command line gives."""

import json

import pytest
import torch

import gossamer as gs
from gossamer.cli import main
from gossamer.testbed import calibration_text, heldout_text

OPTIONS = {"samples": 8, "length": 32, "tokens": 4, "latency": "rule"}


def measured(model, **more):
    texts = calibration_text()[:20_000], heldout_text()[:2_000]
    return gs.measure_compression(model, *texts, **{**OPTIONS, "method": "wanda", **more})


def test_the_model_stays_and_the_folder_is_whole(tiny_llama, tmp_path):
    model = tiny_llama()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = measured(model, sweep=[0.3], exclude=["*down_proj"])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [point["density"] for point in report.facts["sweep"]] == pytest.approx(
        [0.3, 0.5], abs=0.01
    )
    told = report.save(tmp_path / "out", labels={"model": "tiny"})
    assert json.loads((tmp_path / "out/result.json").read_text()) == json.loads(json.dumps(told))
    assert told["bytes"]["files"] > 0 and "files" not in report.facts["bytes"]
    assert "tiny" in (tmp_path / "out/report.html").read_text()
    ids = torch.arange(12)[None]
    fast = gs.load(tmp_path / "out", latency="rule")
    assert torch.equal(fast(ids).logits, report.packed.model(ids).logits)
    with pytest.raises(gs.UsageError, match="not empty"):
        report.save(tmp_path / "out")
    assert "50.0% sparsity" in str(report) and "bits per byte" in str(report)


def test_it_is_what_the_command_does(tiny_llama, tmp_path, capsys):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    for name, text in (("a.txt", calibration_text()[:20_000]), ("b.txt", heldout_text()[:2_000])):
        (tmp_path / name).write_bytes(text)
    words = ["--samples=8", "--length=32", "--tokens=4", "--latency=rule", "--method=wanda"]
    main(["compress", str(tmp_path / "model"), f"--data={tmp_path / 'a.txt'}", *words, "--json",
          f"--eval-data={tmp_path / 'b.txt'}", f"--out={tmp_path / 'out'}"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    mine = json.loads(json.dumps(dict(measured(model).facts), default=str))
    for key in ("quality", "layers", "flops", "coverage", "method", "pattern", "allocation"):
        assert told[key] == mine[key], key


def test_bad_input_is_refused_before_work(tiny_llama):
    with pytest.raises(gs.UsageError, match="positions"):
        measured(tiny_llama(), length=1000)
    with pytest.raises(gs.UsageError, match="rigl"):
        measured(tiny_llama(), method="rigl")
