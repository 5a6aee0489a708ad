"""Reading safetensors from strangers: headers are checked before anything is allocated."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.io.manifest import _one_line, _unique, read_json, regular_file

SINGLE = "{}.safetensors"
INDEX = SINGLE + ".index.json"
SHARD = "{}-{:05d}-of-{:05d}.safetensors"
PLAIN, PACKED = "model", "gossamer"
"""What weight files are called: as everywhere, or by a name that plain loaders do not look for,
since they would take the packed layers' weights for missing and draw random ones."""
MAX_HEADER = 100 << 20
_WIDTH = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, one file or indexed shards.

    Raises FormatError for missing, damaged, contradictory or hostile files.
    """
    name = PACKED if _has(folder, PACKED) else PLAIN
    single, index_name = SINGLE.format(name), INDEX.format(name)
    if not (folder / index_name).exists() and not (folder / index_name).is_symlink():
        return _read_file(folder, single)
    index = read_json(folder, index_name)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise FormatError(f"{index_name}: weight_map is not an object of file names")
    result: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        for key, tensor in _read_file(folder, file).items():
            if places.get(key) != file:
                raise FormatError(f"{file}: holds a tensor that {index_name} does not place there")
            result[key] = tensor
    if set(result) != set(places):
        raise FormatError(f"{index_name}: names tensors that no file holds")
    return result


def _has(folder: Path, name: str) -> bool:
    paths = (folder / SINGLE.format(name), folder / INDEX.format(name))
    return any(path.exists() or path.is_symlink() for path in paths)


def _read_file(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = regular_file(folder, name)
    check_header(path)
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise FormatError(f"{name}: {_one_line(error)}") from None
    return {key: _in_place(tensor) for key, tensor in found.items()}


def _in_place(tensor: Tensor) -> Tensor:
    """The tensor, copied where a header of odd length puts its numbers between addresses that are
    theirs: neither torch nor the kernels expect that."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def check_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's size; raises FormatError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(MAX_HEADER, size - 8):
            raise FormatError(f"{path.name}: truncated, or its header length is wrong")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{path.name}: its header is damaged ({_one_line(error)})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path.name}: its header is no object")
    spans = sorted(_span(path.name, k, v) for k, v in header.items() if k != "__metadata__")
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise FormatError(f"{path.name}: its tensors overlap or leave gaps")
        end = stop
    if end != size - 8 - length:
        raise FormatError(f"{path.name}: its tensors do not fill the file; truncated?")
    return header


def _span(file: str, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{file}: the entry of a tensor is damaged")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not numbers or not all(type(n) is int and 0 <= n < 1 << 48 for n in [*shape, *offsets]):
        raise FormatError(f"{file}: the shape or place of a tensor is damaged")
    count = _WIDTH.get(dtype, 0) if isinstance(dtype, str) else 0
    if not count or len(shape) > 8:
        raise FormatError(f"{file}: a tensor has an unknown dtype or too many dimensions")
    for extent in shape:
        count *= extent
    if offsets[1] - offsets[0] != count:
        raise FormatError(f"{file}: a tensor's bytes do not match its shape")
    return offsets[0], offsets[1]
