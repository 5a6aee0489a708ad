"""gossamer train with rounds: what is reported, a kill inside a round, comparisons, bad input."""

import json

import pytest

from gossamer.cli import main

pytest.importorskip("sklearn")


def flags(out, **options):
    options = {"data": "digits", "model": "mlp", "width": 32, "out": out, **options}
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def result(out):
    return json.loads((out / "result.json").read_text())


def test_imp_reports_all_rounds_together(tmp_path, capsys, stored_tensors, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, log = tmp_path / "out", tmp_path / "log"
    monkeypatch.setattr("gossamer.engine.progress.PAUSE", 0.002)
    main(flags(out, method="imp:rounds=2,rewind=5", density=0.04, steps=30, log=log))
    assert "round 2 of 2" in capsys.readouterr().err
    found = result(out)
    kept = [layer["density"] for layer in found["layers"]]
    assert found["densities"] == pytest.approx([1, 0.2, 0.04], abs=0.001)
    tensors = stored_tensors(out)
    weights = [tensors[f"{layer['name']}.weight"] for layer in found["layers"]]
    for weight, density in zip(weights, kept, strict=True):
        assert int((weight != 0).sum()) <= round(density * weight.numel())
    total = sum(w.numel() for w in weights)
    measured = sum(d * w.numel() for d, w in zip(kept, weights, strict=True)) / total
    assert measured == pytest.approx(found["measured_density"])
    assert found["steps_together"] == 30 + 2 * 25 and len(found["loss"]["curve"]) == 80
    # 30 dense steps, then 25 in each round; layers outside the support stay dense
    dense = 1 - total / (64 * 32 + 32 * 32 + 32 * 10)
    low = 30 + 25 * sum(found["densities"][1:])
    assert low <= 30 * found["flops"]["ratio"] <= 1.001 * (low + 2 * 25 * dense)
    assert found["topology"]["sad_start_to_end"] == pytest.approx(1 - found["measured_density"])
    events = EventAccumulator(str(log))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 81))
    assert events.Scalars("round")[-1].value == 2
    assert events.Scalars("flops")[-1].value == pytest.approx(found["flops"]["spent"], rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]


def test_a_run_killed_inside_a_round_resumes_bitwise(tmp_path, kill_at, over_threads):
    def argv(name):
        return flags(tmp_path / name, model="cnn", method="sparsemodelsoups:rounds=2,members=2", density=0.2, steps=12,
                     save_every=3, batch=32)  # fmt: skip

    folder = tmp_path / ".cut.train" / "checkpoint"
    kill_at(folder / "part-2.safetensors", argv("cut"))
    assert (folder / "rounds.safetensors").exists() and not (tmp_path / "cut").exists()
    over_threads(lambda: (main(argv("whole")), main(argv("cut"))), (1,))
    one, two = result(tmp_path / "whole"), result(tmp_path / "cut")
    for key in ("quality", "loss", "topology", "flops", "layers", "densities", "steps_together"):
        assert one[key] == two[key], key
    files = [(tmp_path / name / "gossamer.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert not folder.exists()


def test_a_comparison_gives_rounds_the_flops_of_one_run(tmp_path):
    out = tmp_path / "out"
    main(flags(out, steps=20, sweep_methods="dense,rigl:every=4,imp:rounds=2", sweep_density="0.3", batch=32))  # fmt: skip
    found = result(out)
    steps = {variant["method"]: variant["steps"] for variant in found["variants"]}
    assert steps["imp:rounds=2"] == 20 < steps["dense"] < steps["rigl:every=4"]
    for variant in found["variants"]:
        spent = variant["runs"][0]["flops"]["spent"]
        assert spent == pytest.approx(found["budget_flops"], rel=0.05), variant["method"]


def refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_input_is_one_line(tmp_path, capsys):
    out = tmp_path / "out"
    assert "rewinds" in refused(flags(out, method="imp:rewind=5", steps=5), capsys)
    assert "rounds" in refused(flags(out, method="imp:rounds=0"), capsys)
    assert "--pattern" in refused(flags(out, method="imp", pattern="2:4"), capsys)
    figures = tmp_path / ".out.train" / "checkpoint" / "figures.json"
    figures.parent.mkdir(parents=True)
    figures.write_text(json.dumps({"fingerprint": {"lr": 3}, "trainings": {}}))
    assert "another run: " in refused(flags(out, method="imp"), capsys)
    figures.write_text("[")
    assert "damaged" in refused(flags(out, method="imp"), capsys)
    assert not out.exists()
