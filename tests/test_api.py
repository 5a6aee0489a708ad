"""gs.compare: one implementation for Python and the command line, with figures that are right."""

import copy
import json

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.cli import main
from gossamer.engine.measure.evaluate import bits_per_byte, embedding_similarity

TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * n} dogs\n" for n in range(40))


@pytest.fixture(scope="module")
def pair(tiny_llama):
    dense = tiny_llama(layers=1, positions=128)
    pruned = gs.prune(copy.deepcopy(dense), gs.weights.Magnitude(), density=0.3)
    return dense, gs.compress(pruned, latency="rule")


@pytest.fixture(scope="module")
def report(pair):
    return gs.compare(*pair, TEXT, tokens=4)


def stored(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_language_model(pair, report):
    dense, fast = pair
    assert report.quality["metric"] == "bits per byte" and report.quality["better"] == "lower"
    for name, model in (("dense", dense), ("sparse", fast)):
        assert report.quality[name] == pytest.approx(bits_per_byte(model, TEXT.encode()))
    assert report.bytes == {"dense": stored(dense), "sparse": stored(fast.model)}
    assert report.bytes["sparse"] < report.bytes["dense"]
    speed = report.speed
    assert speed["unit"] == "tokens/s" and speed["ratio"] == speed["sparse"] / speed["dense"]
    assert report.machine["threads"] == torch.get_num_threads()


def test_it_prints_and_saves(report, tmp_path):
    lines = str(report).splitlines()
    assert lines[0].split() == ["dense", "sparse", "ratio"]
    assert "bits per byte (lower is better)" in lines[1]
    assert f"{report.quality['sparse']:.4f}" in lines[1]
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_json()
    page = report.save(tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "<script" not in page
    assert f"{report.quality['sparse']:.4f}" in page and f"{report.speed['ratio']:.2f}x" in page
    with pytest.raises(gs.UsageError, match=r"\.html or \.json"):
        report.save(tmp_path / "report.txt")
    with pytest.raises(AttributeError):
        report.speed = {}


def test_any_model_on_batches():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    fast = gs.compress(
        gs.prune(copy.deepcopy(dense), gs.weights.Magnitude(), density=0.3), latency="rule"
    )
    batches = [torch.randn(8, 32) for _ in range(3)]
    report = gs.compare(dense, fast, iter(batches))
    assert report.quality["dense"] == 1.0 and report.speed["unit"] == "inputs/s"
    assert report.quality["sparse"] == pytest.approx(embedding_similarity(dense, fast, batches))
    assert 0 < report.quality["sparse"] < 1
    assert gs.compare(dense, dense, batches).quality["sparse"] == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": [torch.zeros(1, 4)]}, "data as bytes or str"),
        ({"data": "a"}, "two tokens"),
        ({"tokens": 0}, "at least 1"),
        ({"tokens": 100}, "at most 96"),
        ({"sparse": nn.Linear(2, 2)}, "not"),
        ({"dense": nn.Linear(2, 2), "sparse": nn.Linear(2, 2)}, "pass tokenizer="),
        ({"dense": 3}, "expected a torch module"),
    ],
    ids=str,
)
def test_bad_input_is_a_usage_error(pair, change, words):
    values = {"dense": pair[0], "sparse": pair[1], "data": TEXT, "tokens": 4, **change}
    dense, sparse, data = (values.pop(name) for name in ("dense", "sparse", "data"))
    with pytest.raises(gs.UsageError, match=words):
        gs.compare(dense, sparse, data, **values)


def test_a_large_vocabulary_needs_its_tokenizer(pair, monkeypatch):
    dense, fast = pair
    monkeypatch.setattr(dense.config, "vocab_size", 32000)
    with pytest.raises(gs.UsageError, match="tokenizer="):
        gs.compare(dense, fast, TEXT)


def test_the_command_prints_what_the_function_measures(pair, report, tmp_path, capsys):
    dense, fast = pair
    dense.save_pretrained(tmp_path / "dense")
    gs.save(fast, tmp_path / "sparse")
    (tmp_path / "text.txt").write_text(TEXT)
    flags = [
        f"--dense={tmp_path / 'dense'}", f"--sparse={tmp_path / 'sparse'}", "--dtype=float32",
        f"--data={tmp_path / 'text.txt'}", "--tokens=4",
    ]  # fmt: skip
    main(["compare", *flags, "--json", f"--out={tmp_path / 'report.html'}"])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == set(report.to_json())
    assert printed["quality"] == pytest.approx(report.quality) and printed["bytes"] == report.bytes
    assert f"{printed['speed']['ratio']:.2f}x" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit) as caught:
        main(["compare", *flags, "--out=report.txt"])
    assert caught.value.code == 2 and ".html or .json" in capsys.readouterr().err


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))


ROWS = [torch.randn(64, 32, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("words", "objects"),
    [
        ({"method": "Wanda", "sparsity": 0.7}, {"method": gs.weights.Wanda(), "density": 0.3}),
        (
            {"method": "sparsegpt:block=8,damping=0.1", "pattern": "2:4"},
            {"method": gs.weights.SparseGPT(block=8, damping=0.1), "pattern": gs.NM(2, 4)},
        ),
        (
            {"method": "dsnot:start=sparsegpt,start.block=8,cycles=9", "pattern": "2:4"},
            {
                "method": gs.weights.DSnoT(gs.weights.SparseGPT(8), cycles=9),
                "pattern": gs.NM(2, 4),
            },
        ),
        (
            {"method": "magnitude", "allocation": "erk", "sparsity": 0.9},
            {"method": gs.weights.Magnitude(), "allocation": gs.ERK(), "density": 0.1},
        ),
        (
            {"method": "wanda: scope = tensor", "allocation": "owl:lam=0.05", "density": 0.5},
            {"method": gs.weights.Wanda("tensor"), "allocation": gs.OWL(lam=0.05), "density": 0.5},
        ),
        (
            {"method": "random:seed=7", "pattern": "unstructured:row", "density": 0.25},
            {"method": gs.weights.Random(7), "pattern": gs.Unstructured("row"), "density": 0.25},
        ),
    ],
)
def test_words_mean_what_objects_do(words, objects):
    first = gs.prune(mlp(), words.pop("method"), data=ROWS, **words)
    second = gs.prune(mlp(), objects.pop("method"), data=ROWS, **objects)
    assert first.provenance == second.provenance
    for name, support in second.supports.items():
        assert torch.equal(first.supports[name].mask, support.mask)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "sparsgpt"}, "did you mean 'sparsegpt'"),
        ({"method": "sparsegpt:blok=3"}, "did you mean 'block'"),
        ({"method": "sparsegpt:block"}, "not option=value"),
        ({"method": "sparsegpt:block=many"}, "block"),
        ({"method": "sparsegpt:block=0"}, "block >= 1"),
        ({"method": "rigl"}, "sparse_training"),
        ({"method": "deepzero"}, "EstimatedGradients"),
        ({"method": "dsnot:start=sparsegpt:block=8"}, "start.block=8"),
        ({"method": 3}, "not a pruning method"),
        ({"pattern": "2-4"}, "write one of"),
        ({"pattern": "unstrucured"}, "did you mean 'unstructured'"),
        ({"pattern": 24}, "pattern is one such as"),
        ({"allocation": "erkk"}, "did you mean 'er"),
        ({"allocation": gs.ERK}, "allocation is one such as"),
        ({"allocation": 3}, "allocation is one such as"),
        ({"sparsity": 0.5, "density": 0.5}, "give density"),
        ({"sparsity": 50}, r"in \[0, 1\)"),
        ({"sparsity": "0.5"}, r"in \[0, 1\)"),
        ({"density": "0.5"}, "number"),
    ],
    ids=str,
)
def test_wrong_words_name_the_right_ones(arguments, words):
    model = mlp()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    values = {"method": "magnitude", "data": ROWS, **arguments}
    if not {"sparsity", "density"} & set(values):
        values["density"] = 0.5
    with pytest.raises(gs.UsageError, match=words) as caught:
        gs.prune(model, values.pop("method"), **values)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_progress_shows_the_passes_over_the_data(capfd, monkeypatch):
    monkeypatch.setattr("gossamer.engine.progress._WORTH", 0.0)
    gs.prune(mlp(), "wanda", density=0.5, data=ROWS, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "reading the data" in err and "pruning" in err
