"""Damage that no other check can see, and what must not be taken for damage."""

import json
import os
import shutil

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer import io
from gossamer.core.errors import FormatError
from gossamer.io import digests

tf = pytest.importorskip("transformers")


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_every_file_has_a_digest_and_nothing_is_wrong(saved):
    names = set(io.read_manifest(saved)["files"])
    assert names == set(os.listdir(saved)) - {"gossamer.json", "README.md"}
    assert io.verify(saved) == []


@pytest.mark.parametrize("name", ["gossamer.safetensors", "config.json", "generation_config.json"])
def test_a_flipped_bit_is_noticed_and_named(name, copy):
    flip(copy / name, -40)
    with pytest.raises(FormatError, match=f"{name}.*verify=False"):
        gs.load(copy)
    problems = io.verify(copy)
    assert len(problems) == 1 and problems[0].startswith(f"{name}: changed")


def test_a_changed_value_loads_only_when_asked(copy):
    path = copy / "gossamer.safetensors"
    flip(path, 8 + int.from_bytes(path.read_bytes()[:8], "little"))  # its first number
    with pytest.raises(FormatError, match="digest"):
        gs.load(copy)
    assert gs.load(copy, verify=False) is not None


def test_a_mixed_up_and_a_missing_file_are_named(copy, tmp_path):
    other = tf.LlamaConfig(vocab_size=64, hidden_size=64).to_json_string()
    (copy / "config.json").write_text(other)
    with pytest.raises(FormatError, match=r"config.json: \d+ bytes, not the"):
        gs.load(copy)
    (copy / "generation_config.json").unlink()
    assert [line.split(":")[0] for line in io.verify(copy)] == [
        "config.json", "generation_config.json",
    ]  # fmt: skip


def test_the_manifest_has_a_digest_of_its_own(copy):
    path = copy / "gossamer.json"
    data = json.loads(path.read_text())
    data["method"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=r"gossamer\.json.*verify=False"):
        gs.load(copy)
    assert io.verify(copy)[0].startswith("gossamer.json")
    assert gs.load(copy, verify=False) is not None
    del data["method"]
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match="no key 'method'"):
        gs.load(copy, verify=False)


def test_other_spaces_and_order_are_the_same_content(copy):
    path = copy / "gossamer.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(sorted(data.items(), reverse=True)), indent=7))
    gs.load(copy)
    assert io.verify(copy) == []


def test_files_that_were_added_do_not_count(copy):
    (copy / "README.md").write_text("mine")
    (copy / "notes").mkdir()
    gs.load(copy)
    assert io.verify(copy) == []


def test_folders_without_digests_load_as_before(copy):
    path = copy / "gossamer.json"
    data = json.loads(path.read_text())
    (copy / "gossamer.safetensors").rename(copy / "model.safetensors")
    assert not data.pop("stored")
    for key in ("files", "digest", "rebuild"):
        del data[key]
    path.write_text(json.dumps({**data, "version": 1}))
    assert gs.load(copy) is not None
    assert "no digests" in io.verify(copy)[0]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "a/../b", ".", "", "a\0b", "a\\b"])
def test_digests_name_files_in_the_folder_alone(name, copy):
    path = copy / "gossamer.json"
    data = json.loads(path.read_text())
    data["files"][name] = {"bytes": 3, "sha256": "0"}
    data["digest"] = digests.digest_of_content(data)
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match="not the name of a file"):
        gs.load(copy)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 4096, 4097, 70_001])
def test_the_digest_depends_on_every_byte_and_its_place(size, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SPAN", 16_384)
    monkeypatch.setattr(digests, "BUFFER", 4096)
    path = tmp_path / "a.safetensors"
    data = bytes(torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size)))
    path.write_bytes(data)
    digest = digests.digest_of(path)
    assert digests.digest_of(path) == digest
    for at in {0, size // 2, size - 1} if size else ():
        path.write_bytes(data[:at] + bytes([data[at] ^ 128]) + data[at + 1 :])
        assert digests.digest_of(path) != digest
    if size >= 4096:
        path.write_bytes(data[1024:2048] + data[:1024] + data[2048:])  # blocks in another order
        assert digests.digest_of(path) != digest


@pytest.mark.parametrize("first, second", [(0, 8), (4, 1020), (8, 1032), (0, 4096)])
def test_exchanged_words_and_signs_are_noticed(first, second, tmp_path):
    data = bytearray(torch.randn(2048, generator=torch.Generator().manual_seed(0)).numpy())
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    digest, other = digests.digest_of(path), bytearray(data)
    for at, place in ((first, second), (second, first)):
        other[at : at + 4] = data[place : place + 4]
    path.write_bytes(other)
    assert digests.digest_of(path) != digest
    for at in (first, second):
        data[at + 7] ^= 128  # the highest bits of two words: their changes cancel in a plain sum
    path.write_bytes(data)
    assert digests.digest_of(path) != digest


def test_digests_do_not_depend_on_threads(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(os.urandom(300_000))
    monkeypatch.setattr(digests, "SPAN", 1 << 16)
    monkeypatch.setattr(digests, "BUFFER", 1 << 14)
    found = set()
    for cores in (1, 4):
        monkeypatch.setattr(digests.os, "cpu_count", lambda cores=cores: cores)
        found.add(digests.digest_of(path)["sums"])
    assert len(found) == 1


def test_a_plain_module_is_verified_too(tmp_path):
    gs.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "out")
    flip(tmp_path / "out/model.safetensors", -1)
    empty = nn.Sequential(nn.Linear(4, 4))
    before = empty[0].weight.detach().clone()
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        gs.load(tmp_path / "out", model=empty)
    assert torch.equal(empty[0].weight, before)
