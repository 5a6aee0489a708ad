"""gossamer train: whole runs, a kill and its resumption, comparisons, one line for bad input."""

import gzip
import json
import re
import struct
from pathlib import Path

import pytest
import torch

import gossamer as gs
from gossamer.cli import main
from gossamer.engine.train.fit import Fit
from gossamer.testbed import Text

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")
TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * n} dogs\n" for n in range(400))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """Inputs of every kind: a tiny language model, text, idx files, images."""
    folder = tmp_path_factory.mktemp("train")
    tiny_llama(width=32, positions=64).save_pretrained(folder / "lm")
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("too short")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("keep")
    idx = folder / "idx"
    idx.mkdir()
    for part, n in (("train", 60), ("t10k", 20)):
        labels = torch.arange(n, dtype=torch.uint8) % 4
        images = (labels * 60).reshape(n, 1, 1).expand(n, 12, 12)
        for name, data in (("images-idx3", images), ("labels-idx1", labels)):
            head = b"\0\0\x08" + bytes([data.dim()]) + struct.pack(f">{data.dim()}I", *data.shape)
            raw = gzip.compress(head + data.contiguous().numpy().tobytes())
            (idx / f"{part}-{name}-ubyte.gz").write_bytes(raw)
    image = pytest.importorskip("PIL.Image")
    for label, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (folder / "photos" / label).mkdir(parents=True)
        for n in range(12):
            picture = image.new("RGB", (40 + n, 30), colour)
            picture.save(folder / "photos" / label / f"{n}.png")
    return folder


def flags(**options):
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def result(out):
    return json.loads((out / "result.json").read_text())


def test_digits_end_to_end(tmp_path, capsys, stored_tensors, monkeypatch):
    out, log = tmp_path / "out", tmp_path / "log"
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("gossamer.engine.progress.PAUSE", 0.002)
    main(
        flags(
            data="digits", steps=60, density=0.1, method="rigl:every=5,drop=0.5", out=out, log=log
        )
    )
    printed = capsys.readouterr()
    assert "ITOP" in printed.out and "loss" in printed.err
    found = result(out)
    tensors = stored_tensors(out)
    kept = total = 0
    for layer in found["layers"]:
        weight = tensors[f"{layer['name']}.weight"]
        kept, total = kept + int((weight != 0).sum()), total + weight.numel()
    assert kept <= round(0.1 * total) == round(found["measured_density"] * total)
    assert found["quality"]["value"] > 0.5 and found["loss"]["last"] < found["loss"]["first"]
    assert 0.1 < found["topology"]["itop_rate"] < 1 and found["topology"]["updates"] == 8
    assert 0.05 < found["flops"]["ratio"] < 0.5
    page = (out / "report.html").read_text()
    assert "<script" not in page and "ITOP" in page and "http" not in page
    assert next(log.glob("events*")).stat().st_size > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]


def test_a_gradient_source_trains_a_dense_model_and_is_charged_its_passes(tmp_path, capsys):
    small = {"data": "digits", "model": "mlp", "width": 8, "steps": 3, "lr": 0.02}
    name = "deepzero:active=0.05"
    main(flags(**small, method=name, out=tmp_path / "one"))
    assert "forward passes in a step" in capsys.readouterr().out
    found = result(tmp_path / "one")
    weights, biases = 64 * 8 + 8 * 8 + 8 * 10, 8 + 8 + 10
    assert found["queries"] == 1 + round(0.05 * weights) + biases
    assert found["measured_density"] == 1.0 and found["requested_density"] is None
    assert found["flops"]["ratio"] == pytest.approx(found["queries"] / 3)
    main(flags(**small, sweep_methods=f"dense,{name}", out=tmp_path / "both"))
    dense, source = result(tmp_path / "both")["variants"]
    assert source["steps"] == 3 and dense["steps"] == found["queries"]


def test_a_killed_run_resumes_bitwise(tmp_path, kill_at, over_threads):
    def argv(out):
        return flags(data="digits", method="set:every=7", density=0.2, steps=60, save_every=10, lr=0.002,
                     optimizer="adamw", out=tmp_path / out)  # fmt: skip

    checkpoint = tmp_path / ".cut.train" / "checkpoint.safetensors"
    kill_at(checkpoint, argv("cut"))
    assert checkpoint.exists() and not (tmp_path / "cut").exists()
    over_threads(lambda: (main(argv("whole")), main(argv("cut"))), (1,))
    one, two = result(tmp_path / "whole"), result(tmp_path / "cut")
    for key in ("quality", "loss", "topology", "flops", "layers"):
        assert one[key] == two[key], key
    files = [(tmp_path / name / "gossamer.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert not checkpoint.exists()


def test_a_comparison_spends_equal_flops_from_equal_seeds(tmp_path, capsys):
    out = tmp_path / "out"
    argv = flags(
        data="digits", model="mlp", width=32, steps=24, sweep_methods="dense,staticrandom,gmp:every=4,srste",
        sweep_density="0.1,0.3", seeds=2, batch=32, out=out,
    )  # fmt: skip
    main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == result(out)
    variants = [(variant["method"], variant["density"]) for variant in found["variants"]]
    assert variants == [("dense", None), ("staticrandom", 0.1), ("staticrandom", 0.3), ("gmp:every=4", 0.1),
                    ("gmp:every=4", 0.3), ("srste", None)]  # fmt: skip
    for variant in found["variants"]:
        assert [run["seed"] for run in variant["runs"]] == [0, 1] and variant["steps"] >= 24
        for run in variant["runs"]:
            assert run["flops"]["spent"] == pytest.approx(found["budget_flops"], rel=0.04)
    page = (out / "report.html").read_text()
    assert "staticrandom" in page and "<svg" in page and "±" in page


def test_an_interrupted_comparison_keeps_its_finished_runs(tmp_path, monkeypatch, capsys):
    def argv(name):
        return flags(data="digits", model="mlp", width=16, steps=4, density=0.2, batch=32, seeds=2,
                     sweep_methods="staticrandom,set", out=tmp_path / name)  # fmt: skip

    main(argv("whole"))
    train, calls = Fit.train, []

    def counted(self, *args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        train(self, *args, **more)

    monkeypatch.setattr(Fit, "train", counted)
    with pytest.raises(SystemExit) as caught:
        main(argv("cut"))
    assert caught.value.code == 130 and "resumes the run" in capsys.readouterr().err
    main(argv("cut"))
    assert len(calls) == 3 + 2
    assert result(tmp_path / "cut")["variants"] == result(tmp_path / "whole")["variants"]


@pytest.mark.parametrize("scratch", ["true", "false"])
def test_language_models(place, tmp_path, scratch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {place / 'text.txt'}\nmodel: {place / 'lm'}\nmethod: srste:decay=0.001\npattern: '2:4'\n"
        f"steps: 6\nbatch: 4\nlength: 32\nscratch: {scratch}\nout: {tmp_path / 'out'}\n"
        "clip: 1.0\n"
    )
    main(["train", "--config", str(recipe)])
    found = result(tmp_path / "out")
    assert found["measured_density"] == 0.5 and found["quality"]["metric"] == "bits per byte"
    assert 2 < found["quality"]["value"] < 9
    model = gs.load(tmp_path / "out")
    groups = model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4)
    assert int((groups != 0).sum(1).max()) <= 2


def test_a_small_llama_learns_any_text(place, tmp_path):
    def train(data, name):
        main(flags(data=data, model="llama", width=32, method="set", density=0.3, steps=4, batch=4,
                   length=32, out=tmp_path / name))  # fmt: skip
        return result(tmp_path / name)

    found = train("testbed:text", "bundled")
    shared = gs.measure_training(
        Text(32, 88, context=32, batch_size=4), gs.weights.SET(0.3), steps=4
    )
    for key in ("quality", "loss", "layers", "flops"):
        assert found[key] == json.loads(json.dumps(shared.facts))[key], key
    own = train(place / "text.txt", "own")
    assert own["quality"]["metric"] == "bits per byte" and own["measured_density"] < 0.31
    assert (tmp_path / "own" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["fashion-mnist:{}/idx", "images:{}/photos"])
def test_images_from_files(place, tmp_path, kind):
    main(flags(data=kind.format(place), density=0.3, width=4, steps=20, batch=16, lr=0.05,
               out=tmp_path / "out"))  # fmt: skip
    assert result(tmp_path / "out")["quality"]["value"] > 0.7


def test_the_recipe_of_the_guide_runs(tmp_path):
    guide = Path(__file__).parents[2] / "docs" / "guide" / "train-command.md"
    recipe = re.search(r"```yaml\n(.*?)```", guide.read_text(), re.DOTALL).group(1)
    (tmp_path / "recipe.yaml").write_text(recipe)
    out = tmp_path / "out"
    main(["train", "--config", str(tmp_path / "recipe.yaml"), "--steps=20", f"--out={out}"])
    found = result(out)
    assert found["method"].startswith("rigl") and found["measured_density"] <= 0.1
    assert found["topology"]["updates"] == 1 and found["steps"] == 20


BAD = [
    ({"density": 1e-5}, "leave"),
    ({"density": 1.5}, "(0, 1]"),
    ({"method": "rigel"}, "did you mean 'rigl'"),
    ({"method": "wanda"}, "gossamer compress"),
    ({"method": "srste", "density": 0.3}, "--pattern"),
    ({"method": "srste", "pattern": "2:5"}, "divisible by 5"),
    ({"method": "scl", "density": 0.3}, "no density to ask for"),
    ({"method": "imp:rewind=3"}, "rewinds"),
    ({"method": "wgsef"}, "coupled"),
    ({"pattern": "2:4"}, "leave it out"),
    ({"method": "deepzero", "density": 0.1}, "no density to ask for"),
    ({"method": "deepzero", "model": "mlp", "exclude": '["*"]'}, "leave include and exclude out"),
    ({"method": "rigl:speed=3"}, "unknown option of rigl 'speed'"),
    ({"method": "rigl:every=0"}, "every"),
    ({"method": "rigl:density=0.3"}, "give --density"),
    ({"method": "rigl:every"}, "every=1"),
    ({"method": "rigl:drop=often"}, "drop"),
    ({"allocation": "best"}, "uniform"),
    ({"allocation": "lamp"}, "uniform+, er, erk"),
    ({"data": "digit"}, "choose digits"),
    ({"data": "testbed:text"}, "is text"),
    ({"data": "digits", "model": "testbed:lm"}, "is images"),
    ({"data": "fashion-mnist:nowhere"}, "four files"),
    ({"data": "images:nowhere"}, "subfolders"),
    ({"data": "{}/short.txt", "model": "{}/lm"}, "need more text"),
    ({"data": "{}/text.txt", "model": "{}/lm", "length": 80}, "64 positions"),
    ({"data": "{}/text.txt", "model": "{}/gone"}, "no such folder"),
    ({"lr": -1}, "lr"),
    ({"steps": 0}, "steps"),
    ({"batch": 5000}, "--batch"),
    ({"optimizer": "lion"}, "sgd, adamw"),
    ({"schedule": "step"}, "cosine"),
    ({"sweep_density": "a"}, "--sweep-density"),
    ({"seeds": 3}, "--sweep-methods"),
    ({"save_every": 0}, "--save-every"),
    ({"exclude": '["nine"]'}, "matches no layer"),
    ({"out": "{}/full"}, "--overwrite"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_line(options, message, place, tmp_path, capsys):
    values = {"out": tmp_path / "out", "steps": 3, **options}
    values = {k: v.replace("{}", str(place)) if isinstance(v, str) and "{}/" in v else v
              for k, v in values.items()}  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(flags(**values))
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert caught.value.code == 2 and captured.out == ""
    assert line.startswith("gossamer: error: ") and message in line
    assert not (tmp_path / "out").exists() and (place / "full" / "mine.txt").exists()


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(tmp_path, capsys):
    argv = flags(data="digits", model="mlp", steps=60, save_every=1, lr=1e18, optimizer="sgd",
                 out=tmp_path / "out")  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "gossamer: error: " in capsys.readouterr().err
    from gossamer.engine.train.checkpoint import read_state

    state = read_state(tmp_path / ".out.train" / "checkpoint.safetensors")
    assert state["step"] >= 1
    assert all(bool(torch.isfinite(v).all()) for v in state["model"].values())


def test_a_checkpoint_of_another_run_is_refused(tmp_path, capsys):
    hidden = tmp_path / ".out.train"
    argv = flags(data="digits", model="mlp", steps=4, lr=0.1, out=tmp_path / "out")
    from gossamer.engine.train.checkpoint import write_state

    write_state(hidden / "checkpoint.safetensors", {"fingerprint": json.dumps({"lr": 3})})
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "another run: " in capsys.readouterr().err
    write_state(hidden / "checkpoint.safetensors", {"fingerprint": 3})
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "damaged" in capsys.readouterr().err
