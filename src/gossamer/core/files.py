"""Files that appear whole or not at all, and tensors readable by whom the user's umask lets."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder() -> Path:
    """This user's cache folder: gossamer in XDG_CACHE_HOME."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if Path(named).is_absolute() else Path.home() / ".cache") / "gossamer"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then give it its name.

    Makes the folder where it is missing. Raises OSError where the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, str]) -> None:
    """One safetensors file with `facts` as its metadata, of the mode that any new file gets here.

    safetensors by itself leaves files that only their owner reads, whatever the umask. Raises
    OSError where the disk is full.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, dict(facts))
    path.chmod(_new_mode(path.parent))


def _new_mode(folder: Path) -> int:
    """The mode of a file that is made in the folder: asking for the umask would first change it,
    for all threads, and not know of access lists."""
    probe = folder / f".mode-{secrets.token_hex(8)}"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        probe.unlink()
