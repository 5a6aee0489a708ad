"""Save, load, export: bitwise round trips, and one clear error for 240 kinds of damage."""

import json
import os
import random
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gossamer as gs
from gossamer.core.errors import FormatError, UsageError
from gossamer.core.matrix import as_matrix
from gossamer.io import atomic
from gossamer.nn import BitmapLinear, NMLinear, QuantizedLinear

transformers = pytest.importorskip("transformers")


def llama(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def logits(model):
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "build", [llama, lambda: llama(tied=True), gpt2], ids=["llama", "tied", "gpt2"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_and_export(build, dtype, tmp_path):
    model = build()
    # not model.to(dtype): that would round the rotary frequencies too, which no file stores
    model = type(model)._from_config(model.config, dtype=dtype).eval()
    pruned = gs.prune(model, gs.Magnitude(), density=0.4)
    masked = {n: p.detach().clone() for n, p in model.named_parameters()}
    dense = logits(model)
    fast = gs.compress(pruned)
    expected = logits(fast.model)
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert sum(isinstance(m, BitmapLinear) for m in again.modules()) == len(pruned.layers)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    gs.export(tmp_path / "out", tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense", dtype=dtype)
    assert torch.equal(logits(plain), dense)
    assert all(torch.equal(p, masked[n]) for n, p in plain.named_parameters())
    assert torch.equal(logits(gs.load(tmp_path / "dense")), dense)


@pytest.mark.parametrize(
    "text", ["unstructured:row", "2:4", "1:8", "block:4x1", "channel:0", "channel:1"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pattern_round_trips_in_a_plain_module(text, dtype, tmp_path):
    pattern = gs.parse_pattern(text)
    density = None if isinstance(pattern, gs.NM) else 0.5

    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, 8, bias=False)).to(dtype)

    pruned = gs.prune(build(), gs.Magnitude(), pattern=pattern, density=density)
    fast = gs.compress(pruned).model
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out", model=build())
    x = torch.randn(3, 72).to(dtype)
    assert torch.equal(again(x), fast(x))
    assert again[0].pattern == text and torch.equal(again[0].values, fast[0].values)
    with pytest.raises(UsageError, match="model="):
        gs.load(tmp_path / "out")


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nm_round_trip_and_export(build, dtype, tmp_path):
    model = build()
    model = type(model)._from_config(model.config, dtype=dtype).eval()
    pruned = gs.prune(model, gs.Magnitude(), pattern=gs.NM(1, 4))
    masked = {n: p.detach().clone() for n, p in model.named_parameters()}
    fast = as_nm(pruned, "1:4")
    expected = logits(fast)
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    gs.export(tmp_path / "out", tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense", dtype=dtype)
    assert all(torch.equal(p, masked[n]) for n, p in plain.named_parameters())


def as_nm(pruned, pattern):
    """In this form whatever its size: layers this small would be smaller with a bitmap."""
    for record in pruned.layers:
        module = pruned.model.get_submodule(record.name)
        layer = NMLinear.from_matrix(as_matrix(module), module.bias, pattern)
        pruned.model.set_submodule(record.name, layer)
    return pruned.model


def nm_parts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 33))
    pruned = gs.prune(net, gs.Magnitude(), pattern=gs.NM(2, 8))
    return as_nm(pruned, "2:8"), nn.Sequential(nn.Linear(200, 33))


@pytest.mark.parametrize(
    "change",
    [
        {"storage": "bitmap"}, {"storage": None}, {"storage": ["nm"]}, {"pattern": ""},
        {"pattern": "unstructured"}, {"pattern": "2:4"}, {"pattern": "1:8"}, {"pattern": "2:7"},
        {"pattern": "9:4"}, {"nnz": 5}, {"nnz": -1}, {"dtype": "bfloat16"}, {"dtype": "int8"},
        {"shape": [33, 2**31 - 1]}, {"shape": [2**31 - 1, 200]}, {"shape": [33, 201]},
        {"shape": [33, 128]}, {"bias": False}, {"extra": 1}, {"group": 64},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_nm_layers_get_one_clear_error(change, tmp_path):
    fast, empty = nm_parts()
    gs.save(fast, tmp_path / "out")
    edit(tmp_path / "out", lambda data: layer_of(data).update(change))
    before = {k: v.clone() for k, v in empty.state_dict().items()}
    with pytest.raises(FormatError) as caught:
        gs.load(tmp_path / "out", model=empty)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(empty.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.uint32, torch.int32, torch.complex64, torch.float64])
def test_nm_values_of_another_dtype_get_one_clear_error(dtype, tmp_path):
    fast, empty = nm_parts()
    gs.save(fast, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["0.values"] = tensors["0.values"].to(dtype)
    save_file(tensors, path)
    with pytest.raises(FormatError):
        gs.load(tmp_path / "out", model=empty)


@pytest.mark.parametrize("more", range(8))
def test_tensors_begin_where_their_numbers_may_whatever_the_header(more, tmp_path):
    fast, empty = quantised_parts(False, 0.05, False, 4)
    gs.save(fast, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    start = struct.pack("<Q", size + more) + data[8 : 8 + size] + b" " * more
    path.write_bytes(start + data[8 + size :])
    again = gs.load(tmp_path / "out", model=empty)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, fast.state_dict()[name])
        assert tensor.data_ptr() % tensor.element_size() == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_codes_is_noticed_or_moves_one_value_at_most(seed, tmp_path):
    """A place that changes and still ascends is another matrix, as a changed value is."""
    fast, empty = nm_parts()
    gs.save(fast, tmp_path / "out")
    flip_part(tmp_path / "out", ".codes", random.Random(seed))
    try:
        again = gs.load(tmp_path / "out", model=empty)
    except FormatError as error:
        assert "layer 0: nm" in str(error)
    else:
        changed = again[0].to_matrix() != fast[0].to_matrix()
        assert int(changed.sum()) <= 2 and int(changed.any(1).sum()) <= 1  # none: of padding


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_quantised_round_trip_and_export(build, bits, tmp_path):
    model = build()
    gs.prune(model, gs.Magnitude(), density=0.4)
    fast = gs.compress(model, bits=bits, group=64).model
    expected = logits(fast)
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    half = gs.load(tmp_path / "out", dtype=torch.bfloat16)
    assert half.get_submodule(sorted(again_names(again))[0]).scales.dtype == torch.bfloat16
    gs.export(tmp_path / "out", tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for name in again_names(again):
        weight = as_matrix(plain.get_submodule(name))
        assert torch.equal(weight, again.get_submodule(name).to_matrix().to(weight.dtype))
    assert torch.allclose(logits(plain), expected, atol=0.02)  # the kernels round inputs as well


def again_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


def quantised_parts(symmetric, outliers, dense, bits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(150, 33))
    weight = net[0].weight.detach()
    if not dense:
        weight = weight * (torch.rand_like(weight) < 0.4)
    layer = QuantizedLinear.from_matrix(
        weight, net[0].bias, bits=bits, group=64, symmetric=symmetric, outliers=outliers
    )
    return nn.Sequential(layer), net


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
@pytest.mark.parametrize("dense", [True, False])
def test_every_quantised_form_round_trips(bits, symmetric, outliers, dense, tmp_path):
    fast, empty = quantised_parts(symmetric, outliers, dense, bits)
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out", model=empty)
    assert set(again.state_dict()) == set(fast.state_dict())
    assert all(torch.equal(again.state_dict()[k], v) for k, v in fast.state_dict().items())
    torch.testing.assert_close(again(torch.ones(2, 150)), fast(torch.ones(2, 150)))
    assert again[0].kept == fast[0].kept and again[0].sparse == fast[0].sparse


@pytest.mark.parametrize(
    "change",
    [
        {"group": 96}, {"group": 1 << 40}, {"group": True}, {"group": None}, {"group": 128},
        {"zeros": False}, {"zeros": 1}, {"sparse": False}, {"outliers": 0}, {"outliers": -1},
        {"outliers": 10**9}, {"nnz": 5}, {"dtype": "int8"}, {"dtype": "int3"}, {"extra": 1},
        {"shape": [2**31 - 1, 150]}, {"shape": [33, 2**31 - 1]}, {"shape": [150, 33]},
        {"dtype": "float32"}, {"bias": False},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_quantised_layers_get_one_clear_error(change, tmp_path):
    fast, empty = quantised_parts(False, 0.05, False, 4)
    gs.save(fast, tmp_path / "out")
    edit(tmp_path / "out", lambda data: layer_of(data).update(change))
    before = {k: v.clone() for k, v in empty.state_dict().items()}
    with pytest.raises(FormatError) as caught:
        gs.load(tmp_path / "out", model=empty)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(empty.state_dict()[k], v) for k, v in before.items())


def test_bert_whose_buffers_live_below_the_config(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=128,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    gs.prune(model, gs.Magnitude(), density=0.4)
    gs.save(gs.compress(model), tmp_path / "out")
    again = gs.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids)[0], model(ids)[0])


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["gossamer.io.save"], "SHARD", 40_000)
    model = llama()
    gs.prune(model, gs.Magnitude(), density=0.4)
    fast = gs.compress(model).model
    gs.save(fast, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(gs.load(tmp_path / "out")), logits(fast))


def test_occupied_folder_and_full_disk(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UsageError, match="overwrite"):
        gs.save(net, out)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        gs.save(net, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "keep me" and os.listdir(tmp_path) == ["out"]
    monkeypatch.undo()
    gs.save(net, out, overwrite=True)
    assert sorted(os.listdir(out)) == ["gossamer.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = llama()
    gs.prune(model, gs.Magnitude(), density=0.4)
    gs.save(gs.compress(model), folder)
    return folder


def edit(folder, change):
    data = json.loads((folder / "gossamer.json").read_text())
    change(data)
    (folder / "gossamer.json").write_text(json.dumps(data))


def layer_of(data):
    return data["layers"][sorted(data["layers"])[0]]


def set_layer(**values):
    return lambda folder, rng: edit(folder, lambda data: layer_of(data).update(values))


def set_top(**values):
    return lambda folder, rng: edit(folder, lambda data: data.update(values))


def raw(name, content):
    return lambda folder, rng: (folder / name).write_bytes(content)


def config(**values):
    return raw(
        "config.json", json.dumps({"architectures": ["LlamaForCausalLM"], **values}).encode()
    )


def header(change):
    def mutate(folder, rng):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + size])
        change(content, sorted(k for k in content if k != "__metadata__"))
        text = json.dumps(content).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return mutate


def truncate(name):
    def mutate(folder, rng):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: rng.randrange(len(data) - 2)])

    return mutate


def flip_header(folder, rng):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[rng.randrange(8)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_bitmap(folder, rng):
    flip_part(folder, ".bitmap", rng)


def flip_part(folder, part, rng):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    content = json.loads(data[8 : 8 + size])
    name = rng.choice([k for k in content if k.endswith(part)])
    begin, end = content[name]["data_offsets"]
    data[8 + size + rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def index_to(target):
    def mutate(folder, rng):
        content = {"weight_map": {"lm_head.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return mutate


def link(name):
    def mutate(folder, rng):
        (folder / name).rename(folder.parent / f"moved-{name}")
        (folder / name).symlink_to(folder.parent / f"moved-{name}")

    return mutate


def rename_layer(folder, rng):
    def change(data):
        name = rng.choice(sorted(data["layers"]))
        data["layers"][name + "x"] = data["layers"].pop(name)

    edit(folder, change)


def drop_layer(folder, rng):
    edit(folder, lambda data: data["layers"].pop(rng.choice(sorted(data["layers"]))))


DAMAGE = {
    "shape swapped": set_layer(shape=[64, 65]),
    "shape huge": set_layer(shape=[2**30, 2**30]),
    "shape beyond": set_layer(shape=[2**62, 2**62]),
    "shape negative": set_layer(shape=[-64, 64]),
    "shape float": set_layer(shape=[64.0, 64]),
    "shape bool": set_layer(shape=[True, 64]),
    "shape short": set_layer(shape=[64]),
    "shape text": set_layer(shape="64x64"),
    "nnz huge": set_layer(nnz=10**30),
    "nnz negative": set_layer(nnz=-1),
    "nnz off": set_layer(nnz=1),
    "dtype code": set_layer(dtype="__import__('os')"),
    "dtype other": set_layer(dtype="bfloat16"),
    "dtype list": set_layer(dtype=["float32"]),
    "bias lie": set_layer(bias=True),
    "bias text": set_layer(bias="no"),
    "pattern unknown": set_layer(pattern="diagonal"),
    "pattern number": set_layer(pattern=3),
    "density high": set_layer(density=1.5),
    "density text": set_layer(density="half"),
    "layer key": set_layer(extra=1),
    "layer null": set_top(layers={"lm_head": None}),
    "version new": set_top(version=2),
    "version zero": set_top(version=0),
    "version text": set_top(version="1"),
    "version bool": set_top(version=True),
    "format other": set_top(format="pickle"),
    "unknown key": set_top(hook="evil.py"),
    "layers list": set_top(layers=[]),
    "layers empty": set_top(layers={}),
    "method list": set_top(method=[]),
    "provenance null": set_top(provenance=None),
    "not utf8": raw("gossamer.json", b"\xff\xfe{}"),
    "empty json": raw("gossamer.json", b""),
    "array": raw("gossamer.json", b"[]"),
    "deep": raw("gossamer.json", b"[" * 200_000),
    "nan": raw("gossamer.json", b'{"format": NaN}'),
    "big number": raw("gossamer.json", b'{"version": ' + b"9" * 10_000 + b"}"),
    "duplicate": raw("gossamer.json", b'{"format": "gossamer", "format": "gossamer"}'),
    "config empty": raw("config.json", b"{}"),
    "config array": raw("config.json", b"[1]"),
    "config class": raw("config.json", b'{"architectures": ["system"]}'),
    "config path": raw("config.json", b'{"architectures": ["os.system"]}'),
    "config type": config(hidden_size="x"),
    "config size": config(hidden_size=48),
    "config deep": config(num_hidden_layers=10**9),
    "config labels": config(num_labels=10**12),
    "weights empty": raw("model.safetensors", b""),
    "weights pickle": raw("model.safetensors", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "header huge": raw("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    "header long": raw("model.safetensors", struct.pack("<Q", 200 << 20) + b"{}"),
    "header text": raw("model.safetensors", struct.pack("<Q", 4) + b"\xff\xff\xff\xff"),
    "tensor shape": header(lambda c, n: c[n[0]].update(shape=[2**40, 2**40])),
    "tensor negative": header(lambda c, n: c[n[0]].update(shape=[-1])),
    "tensor dtype": header(lambda c, n: c[n[0]].update(dtype="OBJ")),
    "tensor offsets": header(lambda c, n: c[n[0]].update(data_offsets=[0, 2**60])),
    "tensor swap": header(lambda c, n: c.update({n[1]: c[n[2]], n[2]: c[n[1]]})),
    "tensor missing": header(lambda c, n: c.pop(n[0])),
    "tensor renamed": header(lambda c, n: c.update({"../x": c.pop(n[0])})),
    "tensor entry": header(lambda c, n: c.update({n[0]: 5})),
    "tensor overlap": header(lambda c, n: c[n[0]].update(data_offsets=c[n[1]]["data_offsets"])),
    "index up": index_to("../outside.safetensors"),
    "index absolute": index_to("/etc/passwd"),
    "index dots": index_to(".."),
    "index number": index_to(5),
    "index missing": index_to("none.safetensors"),
    "index nul": index_to("a\0b"),
    "index partial": index_to("model.safetensors"),
    "link weights": link("model.safetensors"),
    "link manifest": link("gossamer.json"),
    "link config": link("config.json"),
    "layer renamed": rename_layer,
    "layer dropped": drop_layer,
}  # fmt: skip
CASES = [(name, change, 0) for name, change in DAMAGE.items()]
CASES += [("truncated weights", truncate("model.safetensors"), seed) for seed in range(70)]
CASES += [("truncated manifest", truncate("gossamer.json"), seed) for seed in range(40)]
CASES += [("header bit", flip_header, seed) for seed in range(20)]
CASES += [("bitmap bit", flip_bitmap, seed) for seed in range(40)]


def test_there_are_at_least_200_kinds_of_damage():
    assert len(CASES) >= 200


@pytest.mark.parametrize(("name", "change", "seed"), CASES, ids=[f"{n}-{s}" for n, _, s in CASES])
def test_damage_gets_one_clear_error(name, change, seed, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    change(folder, random.Random(seed))
    with pytest.raises(FormatError) as caught:
        gs.load(folder)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400


def test_a_huge_claim_allocates_nothing(saved, tmp_path):
    resource = pytest.importorskip("resource")
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    set_layer(shape=[2**30, 2**30], nnz=2**50)(folder, random.Random(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError):
        gs.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
