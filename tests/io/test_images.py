"""Labelled images from files: what is read, and what is refused in one clear line."""

import gzip
import struct

import pytest
import torch

from gossamer.core.errors import FormatError, UsageError
from gossamer.io.images import read_folder, read_idx


def idx(data):
    head = b"\0\0\x08" + bytes([data.dim()]) + struct.pack(f">{data.dim()}I", *data.shape)
    return head + data.contiguous().numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    for part, n in (("train", 6), ("t10k", 4)):
        labels = torch.arange(n, dtype=torch.uint8) % 3
        images = (labels * 60).reshape(n, 1, 1).expand(n, 4, 5)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    return tmp_path


def test_idx_files_plain_and_gzipped(folder):
    x, y, held_x, held_y = read_idx(folder)
    assert x.shape == (6, 1, 4, 5) and held_x.shape == (4, 1, 4, 5) and x.dtype == torch.float32
    assert y.tolist() == [0, 1, 2, 0, 1, 2] and held_y.dtype == torch.int64
    assert torch.equal(x[:, 0, 0, 0], y * 60 / 255)


DAMAGE = {
    "truncated": lambda raw: raw[:-3],
    "longer": lambda raw: raw + b"\0",
    "another kind": lambda raw: b"\0\0\x09" + raw[3:],
    "no rank": lambda raw: raw[:3],
    "rank 9": lambda raw: raw[:3] + b"\x09" + raw[4:],
    "fewer": lambda raw: idx(torch.zeros(5, dtype=torch.uint8)),
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_idx_files_are_refused(folder, damage):
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(FormatError):
        read_idx(folder)


def test_a_missing_file_and_broken_gzip_are_named(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(FormatError, match="t10k-images-idx3-ubyte: damaged"):
        read_idx(folder)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="holds no train-labels-idx1-ubyte"):
        read_idx(folder)


def test_a_folder_of_classes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (tmp_path / label).mkdir()
        for n in range(5):
            image.new("RGB", (40 + n, 30), colour).save(tmp_path / label / f"{n}.png")
    x, y, held_x, held_y = read_folder(tmp_path, seed=1, side=8)
    assert x.shape == (8, 3, 8, 8) and held_x.shape == (2, 3, 8, 8)
    assert torch.equal((x[:, 0, 0, 0] > 0.5).long(), y)  # red is the second class
    other = read_folder(tmp_path, seed=2, side=8)
    assert not torch.equal(torch.cat([y, held_y]), torch.cat([other[1], other[3]]))
    (tmp_path / "red" / "notes.txt").write_text("no image")
    with pytest.raises(FormatError, match="no image that can be read"):
        read_folder(tmp_path)
    with pytest.raises(UsageError, match="at least 2 subfolders"):
        read_folder(tmp_path / "red")
