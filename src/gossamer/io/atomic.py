"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.core.errors import UsageError


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise UsageError unless `folder` can be written: absent, empty, or `overwrite`."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} is not a folder; choose another output folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(
            f"{folder} is not empty; choose another folder or pass overwrite=True (--overwrite)"
        )


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling to fill; renamed to `folder` at the end, removed on any error.

    With `overwrite` the old folder stays until the new one is complete and on disk.
    """
    check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        old = None
        if folder.exists():
            old = temporary.with_name(temporary.name + "-old")
            folder.rename(old)
        temporary.rename(folder)
        _sync(folder.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
