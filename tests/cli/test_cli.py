"""Exit codes and one clear line for bad input; a whole run on a tiny model; pure JSON."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gossamer as gs
from gossamer.cli import COMMANDS, main
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.methods import TOPICS, verdicts

transformers = pytest.importorskip("transformers")
TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * n} dogs\n" for n in range(400))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder / "model")
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
    ({"sparsity": "many"}, "0.5 or 50%"),
    ({"sparsity": 50}, "write 0.5 or 50%"),
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
    ({"bits": 3}, "4 or 8"),
    ({"bits": 4, "group": 100}, "power of two"),
    ({"nonsense": 1}, "--nonsense"),
    ({"sparsty": 0.5}, "did you mean --sparsity?"),
    ({"eval_bytes": -1}, "--eval-bytes"),
    ({"exclude": "nothing*"}, "nothing*"),
    ({"samples": "few"}, "whole number"),
    ({"method": "rigl"}, "gossamer train"),
    ({"method": "deepzero"}, "gossamer train"),
    ({"method": "dsnot:start=monarch"}, "scorer or solver"),
    ({"tokens": 500}, "at most 480"),
    ({"length": 600}, "512 positions"),
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


def test_texts_are_read_before_the_model(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["gossamer.cli.compress"], "read_model", None)
    code, line = fails(
        ["compress", *options(tiny, tmp_path / "out", data=tiny / "empty.txt")], capsys
    )
    assert code == 2 and "no text" in line


def test_a_fault_of_ours_is_one_line_and_exit_1(tiny, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise ValueError("no such luck")

    monkeypatch.setattr(sys.modules["gossamer.cli.compress"], "read_model", broken)
    command = ["compress", *options(tiny, tmp_path / "out")]
    code, line = fails(command, capsys)
    assert code == 1 and "ValueError: no such luck" in line
    assert "report" in line and "--debug" in line
    for debug in ([*command, "--debug"], ["--debug", *command]):
        with pytest.raises(ValueError, match="no such luck"):
            main(debug)
    monkeypatch.setenv("GOSSAMER_DEBUG", "1")
    with pytest.raises(ValueError, match="no such luck"):
        main(command)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_takes_debug_and_usage_errors_stay_one_line(command, capsys, tmp_path):
    code, line = fails([command, "--debug", "--nonsense=1"], capsys)
    assert code == 2 and "nonsense" in line
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--debug" in capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text("debug: true\n")
    code, line = fails([command, f"--config={tmp_path / 'recipe.yaml'}"], capsys)
    assert code == 2 and "command line" in line


def test_debug_prints_the_traceback_and_exits_1(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    code = (
        "import sys, gossamer.cli.report as report, gossamer.cli as cli\n"
        "report.render = lambda _: 1 / 0\n"
        f"cli.main(['report', '--model={tmp_path}', *sys.argv[1:]])"
    )
    ours = [sys.executable, "-c", code]
    plain = subprocess.run(ours, capture_output=True, text=True)
    traced = subprocess.run([*ours, "--debug"], capture_output=True, text=True)
    assert plain.returncode == traced.returncode == 1
    assert plain.stderr.startswith("gossamer: error: ZeroDivisionError: division by zero; ")
    assert plain.stderr.count("\n") == 1
    assert "Traceback" in traced.stderr and "cli/report.py" in traced.stderr


def test_a_full_disk_is_no_fault_of_the_program(tiny, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["gossamer.cli.compress"], "read_model", full)
    command = ["compress", *options(tiny, tmp_path / "out")]
    code, line = fails(command, capsys)
    assert code == 1 and "report" not in line
    with pytest.raises(OSError, match="space"):
        main([*command, "--debug"])


def test_float32_is_compared_with_float32_and_out_may_be_the_current_folder(
    tiny, tmp_path, capsys, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main(["compress", *options(tiny, ".", dtype="float32", method="magnitude"), "--json"])
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    weights = sum(math.prod(x["shape"]) for x in printed["layers"] if x["kernel"])
    assert printed["bytes"]["dense"] == 4 * weights
    assert printed["bytes"]["sparse"] == 2 * weights + weights // 8
    assert (tmp_path / "here" / "result.json").is_file()
    assert "Loading weights" not in captured.err


def test_a_text_encoder(tmp_path, capsys):
    words = sorted({w for line in TEXT.splitlines() for w in line.replace(":", " :").split()})
    folder = tmp_path / "bert"
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(special + words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(special + words), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    flags = [f"--data={tmp_path / 'text.txt'}", "--samples=16", f"--out={out}", "--json"]
    main(["compress", f"--model={folder}", *flags])
    printed = json.loads(capsys.readouterr().out)
    assert printed["quality"]["dense"] == 1.0 and 0 < printed["quality"]["sparse"] < 1
    assert printed["quality"]["better"] == "higher" and printed["speed"]["unit"] == "inputs/s"
    assert all("sell-spmm" in x["kernel"] for x in printed["layers"] if x["kernel"])
    assert printed["speed"]["gain"] == printed["speed"]["ratio"] > 0
    assert "higher is better" in (out / "report.html").read_text()
    flags = [f"--data={tmp_path / 'text.txt'}", "--dtype=float32", "--json"]
    main(["compare", f"--dense={folder}", f"--sparse={out}", *flags])
    assert json.loads(capsys.readouterr().out)["quality"]["sparse"] < 1


def words_of(folder):
    """A tokenizer of the words of TEXT, written into the folder; how many there are."""
    tokenizers = pytest.importorskip("tokenizers")
    known = [
        "[PAD]",
        "[UNK]",
        "</s>",
        *sorted({w for line in TEXT.splitlines() for w in line.split()}),
    ]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(known)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", eos_token="</s>"
    ).save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return len(known)


def of_kind(kind, n):
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    bert = transformers.BertConfig(
        vocab_size=n, hidden_size=64, intermediate_size=128, num_labels=3, **small
    )
    bart = transformers.BartConfig(
        vocab_size=n, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128,
        decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    tower = {"hidden_size": 64, "intermediate_size": 128, **small}
    sight = {**tower, "image_size": 32, "patch_size": 8}
    del sight["max_position_embeddings"]
    text = {**tower, "vocab_size": n, "bos_token_id": 1, "eos_token_id": 2}
    makers = {
        "masked": lambda: transformers.BertForMaskedLM(bert),
        "classes": lambda: transformers.BertForSequenceClassification(bert),
        "bart": lambda: transformers.BartForConditionalGeneration(bart),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**sight)),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=sight)
        ),
    }
    return makers[kind]()


@pytest.mark.parametrize("kind", ["masked", "classes", "bart"])
def test_models_of_text_with_a_head(kind, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    of_kind(kind, words_of(folder)).save_pretrained(folder)
    flags = [f"--data={tmp_path / 'text.txt'}", "--samples=8", "--length=16", "--json"]
    main(["compress", str(folder), *flags, f"--out={tmp_path / 'out'}"])
    printed = json.loads(capsys.readouterr().out)
    assert "outputs" in printed["quality"]["metric"] and 0 < printed["quality"]["sparse"] < 1
    assert printed["speed"]["unit"] == "inputs/s" and printed["flops"]["sparse"] > 0
    coverage = printed["coverage"]["pruned"]
    assert 0 < coverage["pruned"] < coverage["matrices"] <= coverage["total"]
    if kind == "bart":  # both sides are calibrated, and both are counted
        names = {layer["name"] for layer in printed["layers"] if layer["kernel"]}
        assert any("encoder" in n for n in names) and any("decoder" in n for n in names)
    assert printed["flops"]["dense"] >= printed["flops_pruned"]["dense"]


@pytest.mark.parametrize(("kind", "reads"), [("vit", "pixel_values"), ("clip", "and pixel_values")])
def test_models_of_images_are_sent_to_python(kind, reads, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    of_kind(kind, words_of(folder)).save_pretrained(folder)
    flags = [f"--data={tmp_path / 'text.txt'}", f"--out={tmp_path / 'out'}"]
    code, line = fails(["compress", str(folder), *flags], capsys)
    assert code == 2 and reads in line and "gs.prune" in line


def test_layers_that_are_excluded_and_figures_of_the_whole_model(tiny, tmp_path, capsys):
    flags = options(tiny, tmp_path / "out", method="magnitude", exclude="*mlp*")
    main(["compress", *flags])
    shown = capsys.readouterr().out
    printed = json.loads((tmp_path / "out" / "result.json").read_text())
    served = [layer["name"] for layer in printed["layers"] if layer["kernel"]]
    assert len(served) == 8 and not any("mlp" in name for name in served)
    assert printed["model"] in shown and "6 layers run dense: " in shown
    assert "float32; weights are stored as bfloat16" in shown
    work, ours = printed["flops"], printed["flops_pruned"]
    assert work["dense"] - ours["dense"] == work["sparse"] - ours["sparse"] > 0
    assert printed["bytes"]["model_dense"] > printed["bytes"]["files"] > printed["bytes"]["sparse"]
    assert "Pruned " in shown and "Left alone: " in shown and "mlp" in shown
    main(["inspect", str(tmp_path / "out")])
    assert "Left alone: " in capsys.readouterr().out


def test_flops_count_layers_that_run_dense_as_dense(tiny, tmp_path, capsys):
    main(
        ["compress", *options(tiny, tmp_path / "out", method="magnitude", sparsity=0.05), "--json"]
    )
    printed = json.loads(capsys.readouterr().out)
    served = [layer for layer in printed["layers"] if layer["kernel"]]
    ours = printed["flops_pruned"]
    assert not served and ours["sparse"] == ours["dense"]


def test_integers(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    main(["compress", *options(tiny, out, method="magnitude", bits=4, group=64), "--json"])
    printed = json.loads(capsys.readouterr().out)
    kinds = {x["kernel"].split("-")[0] for x in printed["layers"] if x["kernel"]}
    assert kinds == {"int4", "int8"} and printed["bits"] == 4
    assert printed["bytes"]["sparse"] < 0.27 * printed["bytes"]["dense"]  # 2 + 1 + 1/4 of 16 bits
    text = (tiny / "text.txt").read_bytes()
    again = bits_per_byte(gs.load(out).float(), text[len(text) * 9 // 10 :])
    assert again == pytest.approx(printed["quality"]["sparse"], rel=1e-4)
    assert "8 bits" in (out / "report.html").read_text()
    main(["inspect", f"--model={out}"])
    assert "int4" in capsys.readouterr().out


def test_damaged_folder_is_exit_2(tiny, tmp_path, capsys):
    (tmp_path / "gossamer.json").write_text("{")
    code, line = fails(["inspect", f"--model={tmp_path}"], capsys)
    assert code == 2 and "JSON" in line


def test_generate_chooses_inputs_and_says_so(tiny, capsys):
    argv = [
        "generate", str(tiny / "model"), "--prompt", "once upon a time", "--tokens", "4",
        "--data", str(tiny / "text.txt"), "--json", "--activations",
    ]  # fmt: skip
    main([*argv, "teal:density=0.6,allocation=uniform"])
    told = json.loads(capsys.readouterr().out)["activations"]
    assert len(told["layers"]) == 14 and "dense" in told["ways"]
    for wrong, why in (("tael", "did you mean 'teal'"), ("wanda", "is one of weights"),
                       ("teal:density=0", "density")):  # fmt: skip
        assert why in fails([*argv, wrong], capsys)[1]


def test_compress_and_compare_choose_inputs(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    chosen = "teal:density=0.4,allocation=uniform"
    main(["compress", *options(tiny, out, activations=chosen, latency="rule"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["activations"]["density"] == pytest.approx(0.4)
    assert told["measured_density"] == 1.0 and told["quality"]["sparse"] != told["quality"]["dense"]
    kernels = [layer["kernel"] for layer in told["layers"] if layer["kernel"]]
    assert len(kernels) == 14 and all("active" in kernel for kernel in kernels)
    manifest = json.loads((out / "gossamer.json").read_text())
    assert manifest["layers"]["model.layers.0.mlp.up_proj"]["activations"]["by"].startswith("teal")
    assert "Each new token is to read 40.0%" in (out / "report.html").read_text()
    base = ["compare", "--dense", str(tiny / "model"), "--data", str(tiny / "text.txt"), "--tokens", "4",
            "--dtype", "float32", "--json", "--eval-bytes", "600"]  # fmt: skip
    main([*base, "--sparse", str(out)])
    saved = json.loads(capsys.readouterr().out)["quality"]
    assert saved["sparse"] != saved["dense"]
    # so small layers are faster dense, and would stay so
    path = "gossamer.engine.inputs.activations.columns.stay_dense"
    monkeypatch.setattr(path, lambda *given: {})
    main([*base, "--sparse", str(tiny / "model"), "--activations", chosen])
    again = json.loads(capsys.readouterr().out)["quality"]
    assert again["dense"] == saved["dense"] != again["sparse"]


def test_generate_attends_sparsely_and_says_so(tiny, capsys):
    given = ["generate", f"--model={tiny / 'model'}", f"--prompt={TEXT[:120]}", "--tokens=2"]
    main([*given, "--attention=streamingllm:window=16,block=16", "--dense-below=0", "--json"])
    found = json.loads(capsys.readouterr().out)["attention"]
    assert found["calls"] == 2 and found["decode_calls"] == 2 and found["density"] < 0.5
    main([*given, "--attention=blocksparse"])
    assert "0 of 2 layers sparse" in capsys.readouterr().err
    code, line = fails([*given, "--attention=wanda"], capsys)
    assert code == 2 and "gossamer methods attention" in line
    code, line = fails([*given, "--attention=blocksparse:bloks=3"], capsys)
    assert code == 2 and "did you mean 'blocks'" in line


def test_generate_takes_a_cache_method_by_either_option(tiny, capsys):
    given = ["generate", f"--model={tiny / 'model'}", f"--prompt={TEXT[:120]}", "--tokens=3"]
    for option in ("--attention", "--cache"):
        main([*given, f"{option}=quest:tokens=32", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["cache"]["density"] < 0.3 and "attention" not in found
    main([*given, "--attention=streamingllm:window=16,block=16", "--dense-below=0",
          "--cache=snapkv:tokens=30,window=8", "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["attention"]["calls"] == 2 and found["cache"]["layers"][0]["rows"] == 32
    main([*given, "--cache=streamingllm:window=16"])
    assert "of a dense cache" in capsys.readouterr().err
    for bad, said in (
        (["--attention=quest", "--cache=snapkv"], "both for the cache"),
        (["--cache=blocksparse"], "keeps no cache"),
        (["--attention=doublesparsity:dense=0"], "calibrate_attention"),
        (["--cache=quest:tokens=8"], "below 16"),
    ):
        code, line = fails([*given, *bad], capsys)
        assert code == 2 and said in line


def test_the_whole_path(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    main(["compress", *options(tiny, out, sweep="0.3,0.7"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "result.json").read_text())
    assert printed["measured_density"] == pytest.approx(0.5, abs=1e-3)
    assert printed["bytes"]["sparse"] <= 0.6 * printed["bytes"]["dense"]
    kernels = {layer["name"]: layer["kernel"] for layer in printed["layers"]}
    assert kernels["lm_head"] is None and kernels["model.layers.0.mlp.up_proj"]
    assert len(printed["sweep"]) == 3 and printed["speed"]["unit"] == "tokens/s"
    sizes = {round(p["density"], 2): p["bytes"] for p in printed["sweep"]}
    assert sizes[0.5] == printed["bytes"]["sparse"]
    kept = {d: (b - sizes[0.3]) / (sizes[0.7] - sizes[0.3]) for d, b in sizes.items()}
    assert kept[0.5] == pytest.approx(0.5, abs=1e-3)
    assert printed["speed"]["loop"] == "compiled" and printed["speed"]["dense_compiled"] > 0
    stored = bits_per_byte(gs.load(out, dtype=torch.float32), TEXT.encode()[len(TEXT) * 9 // 10 :])
    assert printed["quality"]["sparse"] == pytest.approx(stored, abs=1e-5)
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
    code, line = fails(["report", str(out), f"--out={tmp_path / 'again.html'}"], capsys)
    assert code == 2 and "--overwrite" in line


def test_methods_and_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    main(["methods", "--json"])
    found = {
        f"{m['topic']}.{m['name']}": m["verdict"]
        for m in json.loads(capsys.readouterr().out)["methods"]
    }
    tried = {name: verdict for name, verdict in found.items() if verdict}
    assert tried == verdicts() and "weights.sparsegpt" in found
    main(["methods"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in TOPICS) and "none yet" in listed
    main(["methods", "Weights"])
    listed = capsys.readouterr().out
    weights = [name.partition(".")[2] for name in found if name.startswith("weights.")]
    assert all(name in listed for name in weights) and "undecided" in listed
    main(["methods", "attention"])
    listed = capsys.readouterr().out
    assert "blocksparse" in listed and "key_scorer" in listed and "--attention" in listed
    main(["methods", "activations"])
    listed = capsys.readouterr().out
    assert "teal" in listed and "input_scorer" in listed and "--activations" in listed
    main(["methods", "wanda"])
    page = capsys.readouterr().out
    assert (
        "arxiv.org" in page
        and f"claim here: {found['weights.wanda']}" in page
        and "rigl" not in page
    )
    main([])
    assert "compress" in capsys.readouterr().out


def start(command, environment, journals):
    """The command in the background, once it has finished one more block."""
    before = len(list(journals.glob("*/*.safetensors")))
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(journals.glob("*/*.safetensors"))) <= before:
        time.sleep(0.02)
    return process


def test_killed_and_interrupted_runs_resume_to_the_same_bytes(tiny, over_threads, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    environment["OMP_NUM_THREADS"] = "1"
    flags = {"sweep": 0.3, "allocation": "uniform", "latency": "rule"}  # what is timed, varies
    out = tmp_path / "b" / "out"
    command = [sys.executable, "-m", "gossamer", "compress", *options(tiny, out, **flags)]
    first = start(command, environment, out.parent)
    first.kill()
    first.wait()
    second = start(command, environment, out.parent)
    second.send_signal(signal.SIGINT)
    _, err = second.communicate()
    if second.returncode:  # it may have finished before the signal came
        assert second.returncode == 130 and err.strip().splitlines()[-1].endswith("resumes the run")
        assert list(out.parent.glob(".out.journal*")) and not out.exists()
        subprocess.run(command, check=True, env=environment, capture_output=True)
    clean = tmp_path / "a" / "out"
    over_threads(lambda: main(["compress", *options(tiny, clean, **flags)]), (1,))
    (one,), (two,) = (list(folder.glob("*.safetensors")) for folder in (clean, out))
    assert one.read_bytes() == two.read_bytes() and not list(out.parent.glob(".out*"))
    results = [json.loads((folder / "result.json").read_text()) for folder in (clean, out)]
    assert results[0]["sweep"] == results[1]["sweep"] and len(results[0]["sweep"]) == 2
