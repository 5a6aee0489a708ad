"""Whatever is wrong with a folder gets one clear error, and the model that was to be filled stays."""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gossamer as gs
from gossamer.core.errors import FormatError
from gossamer.io.digests import digest_of_content


def edit(folder, change):
    """As by someone who knows the format: digests agree with what is there."""
    data = json.loads((folder / "gossamer.json").read_text())
    change(data)
    if "digest" in data:
        data["digest"] = digest_of_content(data)
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
        path = folder / "gossamer.safetensors"
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
    path = folder / "gossamer.safetensors"
    data = bytearray(path.read_bytes())
    data[rng.randrange(8)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_bitmap(folder, rng):
    flip_part(folder, ".bitmap", rng)


def flip_part(folder, part, rng):
    path = folder / "gossamer.safetensors"
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
        (folder / "gossamer.safetensors.index.json").write_text(json.dumps(content))

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
    "version new": set_top(version=4),
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
    "weights empty": raw("gossamer.safetensors", b""),
    "weights pickle": raw("gossamer.safetensors", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "header huge": raw("gossamer.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    "header long": raw("gossamer.safetensors", struct.pack("<Q", 200 << 20) + b"{}"),
    "header text": raw("gossamer.safetensors", struct.pack("<Q", 4) + b"\xff\xff\xff\xff"),
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
    "index partial": index_to("gossamer.safetensors"),
    "link weights": link("gossamer.safetensors"),
    "link manifest": link("gossamer.json"),
    "link config": link("config.json"),
    "layer renamed": rename_layer,
    "layer dropped": drop_layer,
}  # fmt: skip
CASES = [(name, change, 0) for name, change in DAMAGE.items()]
CASES += [("truncated weights", truncate("gossamer.safetensors"), seed) for seed in range(70)]
CASES += [("truncated manifest", truncate("gossamer.json"), seed) for seed in range(40)]
CASES += [("header bit", flip_header, seed) for seed in range(20)]
CASES += [("bitmap bit", flip_bitmap, seed) for seed in range(40)]


def test_there_are_at_least_200_kinds_of_damage():
    assert len(CASES) >= 200


@pytest.mark.parametrize(("name", "change", "seed"), CASES, ids=[f"{n}-{s}" for n, _, s in CASES])
@pytest.mark.parametrize("verify", [True, False])
def test_damage_gets_one_clear_error(name, change, seed, verify, saved, tmp_path):
    """Also without digests: nothing may depend on them but the numbers themselves."""
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    change(folder, random.Random(seed))
    with pytest.raises(FormatError) as caught:
        gs.load(folder, verify=verify)
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


def assert_refused_whole(fast, empty, change, folder):
    """One line says what is wrong with the changed entry, and the module to fill stays as it was."""
    gs.save(fast, folder)
    edit(folder, lambda data: layer_of(data).update(change))
    before = {k: v.clone() for k, v in empty.state_dict().items()}
    with pytest.raises(FormatError) as caught:
        gs.load(folder, model=empty)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(empty.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    "change",
    [
        {"storage": "bitmap"}, {"storage": None}, {"storage": ["nm"]}, {"pattern": ""},
        {"pattern": "unstructured"}, {"pattern": "2:4"}, {"pattern": "1:8"}, {"pattern": "2:7"},
        {"pattern": "8:64"}, {"pattern": "9:4"}, {"nnz": 5}, {"nnz": -1}, {"dtype": "bfloat16"}, {"dtype": "int8"},
        {"shape": [33, 2**31 - 1]}, {"shape": [2**31 - 1, 200]}, {"shape": [33, 201]},
        {"shape": [33, 128]}, {"bias": False}, {"extra": 1}, {"group": 64},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_nm_layers_get_one_clear_error(change, nm_parts, tmp_path):
    assert_refused_whole(*nm_parts(), change, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.uint32, torch.int32, torch.complex64, torch.float64])
def test_nm_values_of_another_dtype_get_one_clear_error(dtype, nm_parts, tmp_path):
    fast, empty = nm_parts()
    gs.save(fast, tmp_path / "out")
    path = tmp_path / "out" / "gossamer.safetensors"
    tensors = load_file(path)
    tensors["0.values"] = tensors["0.values"].to(dtype)
    save_file(tensors, path)
    with pytest.raises(FormatError):
        gs.load(tmp_path / "out", model=empty)


@pytest.mark.parametrize("more", range(8))
def test_tensors_begin_where_their_numbers_may_whatever_the_header(more, quantised_parts, tmp_path):
    fast, empty = quantised_parts(False, 0.05, False, 4)
    gs.save(fast, tmp_path / "out")
    path = tmp_path / "out" / "gossamer.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    start = struct.pack("<Q", size + more) + data[8 : 8 + size] + b" " * more
    path.write_bytes(start + data[8 + size :])
    again = gs.load(tmp_path / "out", model=empty, verify=False)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, fast.state_dict()[name])
        assert tensor.data_ptr() % tensor.element_size() == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_codes_is_noticed_or_moves_one_value_at_most(seed, nm_parts, tmp_path):
    """A place that changes and still ascends is another matrix, as a changed value is."""
    fast, empty = nm_parts()
    gs.save(fast, tmp_path / "out")
    flip_part(tmp_path / "out", ".codes", random.Random(seed))
    with pytest.raises(FormatError, match="digest"):
        gs.load(tmp_path / "out", model=empty)
    try:
        again = gs.load(tmp_path / "out", model=empty, verify=False)
    except FormatError as error:
        assert "layer 0: nm" in str(error)
    else:
        changed = again[0].to_matrix() != fast[0].to_matrix()
        assert int(changed.sum()) <= 2 and int(changed.any(1).sum()) <= 1  # none: of padding


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
def test_damaged_quantised_layers_get_one_clear_error(change, quantised_parts, tmp_path):
    assert_refused_whole(*quantised_parts(False, 0.05, False, 4), change, tmp_path / "out")
