"""Digests of a folder's files: damage and mixed-up files are noticed, at the speed of memory.

They tell bit rot from the file that was written. They are no signature: whoever changes a file on
purpose can change its digest too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.errors import FormatError

SPAN, BUFFER, SEGMENT = 64 << 20, 4 << 20, 1024
"""Bytes that one thread digests, reads at once, and has in one row of a matrix to sum."""
HINT = "restore it, or pass verify=False to read it as it is"


def digest_of(path: Path) -> dict[str, Any]:
    """Bytes and digest of a file: of weights `sums`, of others their `sha256`.

    `sums` is a SHA-256 over sums, as SHA-256 alone reads weights several times slower than memory
    is. Every 4 MB of 64-bit numbers are a matrix of 128 columns; the sums of its rows and of its
    columns, modulo 2^64, are hashed in order. Up to three changed words are noticed for certain,
    two that were exchanged among them; more of them unless their changes cancel in every row and
    every column at once.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with path.open("rb") as file:
        handle = file.fileno()
        workers = min(8, os.cpu_count() or 1, size // SPAN + 1)
        with ThreadPoolExecutor(workers) as pool:
            spans = list(pool.map(lambda start: _sums(handle, start), range(0, size, SPAN)))
    return {"bytes": size, "sums": hashlib.sha256(b"".join(spans)).hexdigest()}


def _sums(handle: int, start: int) -> bytes:
    """The digest of one span; the file's last segment is filled up with zeros."""
    found, buffer = hashlib.sha256(), bytearray(BUFFER)
    numbers = np.frombuffer(buffer, dtype="<u8").reshape(-1, SEGMENT // 8)
    for place in range(start, start + SPAN, BUFFER):
        read = _read(handle, buffer, place)
        rows = -(-read // SEGMENT)
        buffer[read : rows * SEGMENT] = bytes(rows * SEGMENT - read)
        for axis in (1, 0):
            found.update(np.add.reduce(numbers[:rows], axis=axis))
        if read < BUFFER:
            break
    return found.digest()


def _read(handle: int, buffer: bytearray, place: int) -> int:
    """Bytes read into the buffer, all of it unless the file ends."""
    view, done = memoryview(buffer), 0
    while done < len(buffer) and (more := os.preadv(handle, [view[done:]], place + done)):
        done += more
    return done


def digest_of_content(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's content, whatever its spaces and the order of its keys."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def changed(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with one file of the folder, None where nothing is."""
    path = folder / name
    if not path.is_file():
        return f"{name}: missing from {folder}; {HINT}"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{name}: {size} bytes, not the {expected['bytes']} that were written; {HINT}"
    if digest_of(path) != expected:
        return f"{name}: changed since the folder was written, its digest differs; {HINT}"
    return None


def check(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise FormatError for the first of the files that is not as it was written."""
    for name, expected in files.items():
        if (problem := changed(folder, name, expected)) is not None:
            raise FormatError(problem)
