"""The text behind the bundled model: Python's documentation and standard library.

Whole files are held out by a hash of their path, so the split never depends on file order.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from gossamer.core.errors import UsageError

SKIPPED = frozenset({"site-packages", "test", "tests", "idle_test", "__pycache__"})
_HELD_OUT_OF_256 = 5


def is_held_out(name: str) -> bool:
    """Whether the file `docs/...` or `stdlib/...` belongs to the held-out part (1 in 51)."""
    return hashlib.sha256(name.encode()).digest()[0] < _HELD_OUT_OF_256


def read(docs: Path, stdlib: Path) -> dict[str, bytes]:
    """Every file's text by name, in a fixed order.

    docs: a folder of *.rst.txt (Debian's python3.11-doc: html/_sources) or *.rst files. stdlib: a
    Python's lib folder; tests and site-packages are left out. Raises UsageError for a folder
    without such files.
    """
    found: dict[str, bytes] = {}
    sources = [("docs", docs, (".rst.txt", ".rst")), ("stdlib", stdlib, (".py",))]
    for label, folder, endings in sources:
        before = len(found)
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and path.name.endswith(endings) and not SKIPPED & set(relative.parts):
                found[f"{label}/{relative.as_posix()}"] = path.read_bytes()
        if len(found) == before:
            raise UsageError(f"{folder}: no {' or '.join(endings)} files; give the right --{label}")
    return found


def split(files: dict[str, bytes]) -> tuple[bytes, bytes]:
    """(training text, held-out text), files joined by newlines."""
    train = b"\n".join(text for name, text in files.items() if not is_held_out(name))
    held = b"\n".join(text for name, text in files.items() if is_held_out(name))
    return train, held


def excerpt(files: dict[str, bytes], held_out: bool, size: int, part: int) -> bytes:
    """About `size` bytes: the first `part` bytes of files of one side, spread evenly over them."""
    names = [name for name in files if is_held_out(name) == held_out and len(files[name]) > 2000]
    step = max(1, len(names) * part // size)
    return b"\n".join(files[name][:part] for name in names[::step])[:size]
