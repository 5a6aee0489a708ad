"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.core.errors import UsageError
from gossamer.core.files import flush


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
    temporary = folder.parent / f".{folder.name}-{secrets.token_hex(8)}"
    temporary.mkdir()  # unlike tempfile's, its mode follows the umask
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        _publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, folder: Path) -> None:
    """Give `temporary` the name `folder`; what had that name is removed afterwards.

    Where the system can exchange two names in one step (Linux), `folder` names the old or the new
    content at every moment. Elsewhere two renames follow each other, undone if the second fails.
    """
    if not folder.exists():
        temporary.rename(folder)
        flush(folder.parent)
        return
    if not _exchange(temporary, folder):
        old = temporary.with_name(temporary.name + "-old")
        folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        temporary = old
    flush(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
