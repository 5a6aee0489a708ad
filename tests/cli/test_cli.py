"""Exit codes and one clear line for bad input; a whole run on a tiny model; pure JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer.cli import main

transformers = pytest.importorskip("transformers")
TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * n} dogs\n" for n in range(400))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text("  \n")
    (folder / "short.txt").write_text("too short")
    (folder / "nothing").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("keep")
    return folder


def options(tiny, out, **changes):
    values = {
        "model": tiny / "model", "data": tiny / "text.txt", "samples": 8, "length": 32,
        "tokens": 4, "out": out, **changes,
    }  # fmt: skip
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def fails(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and lines[-1].startswith("gossamer: error: ")
    assert not any("Traceback" in line for line in lines)
    return caught.value.code, lines[-1]


BAD = [
    ({"model": "missing"}, "no such folder"),
    ({"model": "nothing"}, "config.json"),
    ({"method": "sparsgpt"}, "did you mean 'sparsegpt'"),
    ({"sparsity": 1.5}, "[0, 1)"),
    ({"sparsity": "many"}, "sparsity"),
    ({"pattern": "2:4", "sparsity": 0.7}, "leave --sparsity out"),
    ({"pattern": "3:5"}, "divisible by 5"),
    ({"pattern": "diagonal"}, "unknown pattern"),
    ({"data": "empty.txt"}, "no text"),
    ({"data": "short.txt"}, "need more text"),
    ({"data": "none.txt"}, "no such file"),
    ({"out": "full"}, "--overwrite"),
    ({"allocation": "best"}, "uniform"),
    ({"density": 0.4, "sparsity": 0.6}, "not both"),
    ({"sweep": "a,b"}, "--sweep"),
    ({"dtype": "int3"}, "bfloat16"),
    ({"nonsense": 1}, "nonsense"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[str(c) for c, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(change, words, tiny, tmp_path, capsys):
    paths = {k: tiny / v if k in ("model", "data", "out") else v for k, v in change.items()}
    out = paths.pop("out", tmp_path / "out")
    code, line = fails(["compress", *options(tiny, out, **paths)], capsys)
    assert code == 2 and words in line
    assert not (tmp_path / "out").exists() and (tiny / "full" / "mine.txt").read_text() == "keep"


def test_full_disk_is_exit_1_and_leaves_nothing(tiny, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["gossamer.io.save"], "write_tensors", full)
    code, line = fails(["compress", *options(tiny, tmp_path / "out")], capsys)
    assert code == 1 and "space" in line
    assert not (tmp_path / "out").exists()


def test_damaged_folder_is_exit_2(tiny, tmp_path, capsys):
    (tmp_path / "gossamer.json").write_text("{")
    code, line = fails(["inspect", f"--model={tmp_path}"], capsys)
    assert code == 2 and "JSON" in line


def test_the_whole_path(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    main(["compress", *options(tiny, out, sweep="0.3,0.7"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "result.json").read_text())
    assert printed["measured_density"] == pytest.approx(0.5, abs=1e-3)
    assert printed["bytes"]["sparse"] <= 0.6 * printed["bytes"]["dense"]
    kernels = {layer["name"]: layer["kernel"] for layer in printed["layers"]}
    assert kernels["lm_head"] is None and kernels["model.layers.0.mlp.up_proj"]
    assert len(printed["sweep"]) == 2 and printed["speed"]["unit"] == "tokens/s"
    assert "<svg" in (out / "report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    main(["inspect", f"--model={out}", "--json"])
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 14
    main(["generate", f"--model={out}", "--prompt=abc", "--tokens=5", "--json"])
    assert json.loads(capsys.readouterr().out)["text"].startswith("abc")
    data = f"--data={tiny / 'text.txt'}"
    main(
        [
            "compare",
            f"--dense={tiny / 'model'}",
            f"--sparse={out}",
            data,
            "--tokens=2",
            "--json",
        ]
    )
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert quality["sparse"] != quality["dense"]
    main(["report", f"--model={out}", f"--out={tmp_path / 'again.html'}"])
    assert (tmp_path / "again.html").read_text() == (out / "report.html").read_text()


def test_methods_and_help(capsys):
    main(["methods", "--json"])
    assert {m["name"] for m in json.loads(capsys.readouterr().out)["methods"]} >= {"sparsegpt"}
    main([])
    assert "compress" in capsys.readouterr().out


def test_a_killed_run_resumes_to_the_same_bytes(tiny, tmp_path):
    command = [sys.executable, "-m", "gossamer", "compress"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    clean, killed = tmp_path / "a" / "out", tmp_path / "b" / "out"
    subprocess.run([*command, *options(tiny, clean)], check=True, env=environment)
    journal = killed.parent / ".out.journal"
    process = subprocess.Popen([*command, *options(tiny, killed)], env=environment)
    while process.poll() is None and not list(journal.glob("*.safetensors")):
        pass
    process.kill()
    process.wait()
    assert journal.exists() or killed.exists()
    arguments = options(tiny, killed) + ([] if not killed.exists() else ["--overwrite"])
    subprocess.run([*command, *arguments], check=True, env=environment)
    one, two = (folder / "model.safetensors" for folder in (clean, killed))
    assert one.read_bytes() == two.read_bytes() and not journal.exists()
