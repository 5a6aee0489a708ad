"""gossamer inspect: what serves each layer, and why others stay dense."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.cli import main
from gossamer.nn.kernel_choice.latency import LatencyModel
from gossamer.nn.kernel_choice.machine import machine
from gossamer.nn.serving import serves

TERMS = {
    "dense float32": {1: (0.0, 0.0, 1e-8, 0.0, 0.0)},
    "bitmap-matvec float32": {1: (0.0, 0.0, 0.0, 2e-8, 0.0)},
}
"""Packed wins below half density: 64 x 64 dense is predicted to take 0.041 ms."""


def net():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    for layer, density in zip(layers, (0.2, 0.8), strict=False):
        layer.weight.data[torch.rand(64, 64) > density] = 0
    return layers


@pytest.fixture
def saved(tmp_path):
    result = gs.compress(net(), latency=LatencyModel(machine(), TERMS), large_batches=False)
    gs.save(result, tmp_path / "out")
    return result, tmp_path / "out"


def shown(folder, capsys, *flags):
    main(["inspect", f"--model={folder}", *flags])
    return capsys.readouterr()


def test_kernels_and_reasons_are_those_of_the_result(saved, capsys, monkeypatch):
    result, folder = saved
    decisions = json.loads(shown(folder, capsys, "--json").out)["decisions"]
    assert list(decisions) == ["0", "1", "2"]
    one, many = serves(result.model[0])
    assert (decisions["0"]["kernel"], decisions["0"]["batches"]) == (one, many)
    assert decisions["0"]["decided"] == result.layers[0].decided
    assert decisions["1"]["kernel"] is None
    assert decisions["1"]["reason"].startswith("no kernel wins: predicted dense 0.041 ms")
    assert decisions["1"]["predicted"] == dict(result.layers[1].predicted)
    assert decisions["2"]["reason"] == "no zeros"
    monkeypatch.setenv("COLUMNS", "200")
    text = shown(folder, capsys)
    assert one in text.out and many in text.out and text.err == ""
    assert f"1 layer runs dense: {result.layers[1].reason} (1)." in text.out
    assert "1 layer runs dense: no zeros (2)." in text.out


def test_batches_that_are_prepared_and_integers(tmp_path, capsys):
    gs.save(gs.compress(net(), latency="rule", large_batches=True), tmp_path / "sell")
    gs.save(gs.compress(net(), bits=4), tmp_path / "int4")
    decisions = json.loads(shown(tmp_path / "sell", capsys, "--json").out)["decisions"]
    assert decisions["0"]["kernel"].startswith("bitmap-matvec/")
    assert decisions["0"]["batches"].startswith("sell-") and decisions["0"]["decided"] == "by rule"
    decisions = json.loads(shown(tmp_path / "int4", capsys, "--json").out)["decisions"]
    assert decisions["2"]["kernel"].startswith("int4-")
    assert decisions["0"]["decided"].startswith("asked for; ")
    assert decisions["2"]["batches"].startswith("int4-")


def test_a_bare_model_keeps_why_layers_are_dense(saved, tmp_path, capsys):
    result, _ = saved
    gs.save(result.model, tmp_path / "bare")
    decisions = json.loads(shown(tmp_path / "bare", capsys, "--json").out)["decisions"]
    assert list(decisions) == ["0", "1"]
    assert decisions["0"]["kernel"] == serves(result.model[0])[0]
    assert decisions["1"]["reason"].startswith("no kernel wins")


def test_folders_without_decisions_load_and_are_shown(saved, capsys):
    result, folder = saved
    data = json.loads((folder / "gossamer.json").read_text())
    del data["decisions"]
    data.pop("digest", None)  # as whoever changes a file on purpose would
    (folder / "gossamer.json").write_text(json.dumps(data))
    again = gs.load(folder, model=net())
    assert torch.equal(again[0].to_matrix(), result.model[0].to_matrix())
    assert json.loads(shown(folder, capsys, "--json").out)["decisions"] == {}
    text = shown(folder, capsys)
    assert "64 x 64" in text.out and "does not say why" in text.err


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "\x1b[2J"}, {"reason": 3}, {"batches": None}, {"shape": [64]}, {"density": 2},
        {"predicted": {"dense": "fast"}}, {"predicted": {"dense": -1}}, {"predicted": []},
        {"predicted": {"dense": True}}, {"extra": 1},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_decisions_are_one_clear_error(change, saved, capsys):
    _, folder = saved
    data = json.loads((folder / "gossamer.json").read_text())
    data["decisions"]["1"].update(change)
    data.pop("digest", None)  # as whoever changes a file on purpose would
    (folder / "gossamer.json").write_text(json.dumps(data))
    with pytest.raises(gs.FormatError, match="decision on '1'"):
        gs.load(folder, model=net())
    with pytest.raises(SystemExit) as caught:
        main(["inspect", f"--model={folder}"])
    assert caught.value.code == 2 and capsys.readouterr().out == ""


def test_a_name_from_a_stranger_does_not_steer_the_terminal(saved, capsys):
    _, folder = saved
    data = json.loads((folder / "gossamer.json").read_text())
    data["decisions"]["\x1b[31mred"] = data["decisions"].pop("2")
    data.pop("digest", None)  # as whoever changes a file on purpose would
    (folder / "gossamer.json").write_text(json.dumps(data))
    assert "\x1b[31m" not in shown(folder, capsys).out


def test_verify_compares_every_file(saved, capsys):
    _, folder = saved
    assert "as it was written" in shown(folder, capsys, "--verify").out
    (weights,) = folder.glob("*.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(folder), "--verify", "--json"])
    found = capsys.readouterr()
    assert caught.value.code == 2 and weights.name in json.loads(found.out)["wrong"][0]
    assert weights.name in found.err


def test_layers_of_a_kind_stand_in_one_line_unless_asked(tmp_path, capsys, tiny_llama, monkeypatch):
    model = tiny_llama()
    gs.save(
        gs.compress(gs.prune(model, gs.weights.Magnitude(), density=0.5), latency="rule"),
        tmp_path / "a",
    )
    text = shown(tmp_path / "a", capsys).out
    assert "model.layers.*.mlp.up_proj" in text and "layers.0.mlp" not in text
    every = shown(tmp_path / "a", capsys, "--layers").out
    assert "model.layers.1.mlp.up_proj" in every and len(every) > len(text)
    monkeypatch.setenv("COLUMNS", "60")
    narrow = shown(tmp_path / "a", capsys).out
    assert "model.layers.*.self_attn.q_proj\n" in narrow
    assert max(map(len, narrow.splitlines()[1:])) <= 60  # the first has the path
    kernels = json.loads(shown(tmp_path / "a", capsys, "--json").out)["layers"]
    assert all(facts["kernel"] and facts["window"] is None for facts in kernels.values())


def test_folders_that_gossamer_did_not_write_are_explained(tmp_path, capsys, tiny_llama):
    tiny_llama(layers=1).save_pretrained(tmp_path / "plain")
    for folder, says in ((tmp_path / "plain", "an ordinary model folder"), (tmp_path, "holds no")):
        with pytest.raises(SystemExit) as caught:
            main(["inspect", str(folder)])
        assert caught.value.code == 2 and says in capsys.readouterr().err


def test_serves_says_what_unprepared_layers_do_with_batches(saved):
    result, _ = saved
    layer = result.model[0]
    layer.unpack_from = 1 << 62
    assert "unpack" not in serves(layer)[1]
    assert dataclasses.asdict(result.layers[0])["batch_kernel"].split("/")[0] in (
        "bitmap-spmm",
        "bitmap-unpack",
    )
