"""gossamer.json: what is packed, how it was made. Strict: unknown keys fail."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from gossamer.core.budget import Fraction, Threshold
from gossamer.core.errors import FormatError, PatternError, UsageError
from gossamer.core.pattern import NM, Pattern, parse_pattern
from gossamer.io.digests import HINT, digest_of_content
from gossamer.io.stored import DTYPES as STORABLE
from gossamer.io.stored import Stored

NAME = "gossamer.json"
VERSION = 3
"""3 where layers choose their inputs; everything else is written as 2."""
MAX_JSON = 16 << 20
DTYPES = ("float32", "bfloat16")
QUANTIZED = ("int4", "int8")


@dataclass(frozen=True)
class Active:
    """How a layer stored as columns chooses its inputs.

    by: the method, in words. kept: the fraction of inputs. norms: whether scores have factors.
    rank: of the low-rank part, 0 without. turns: the layer that holds the rotation of the inputs.
    across: of integers, whether scales belong to outputs.
    """

    by: str
    kept: float
    budget: Threshold | Fraction
    norms: bool
    rank: int
    turns: str | None
    across: bool
    facts: dict[str, float]


@dataclass(frozen=True)
class PackedLayer:
    """One packed layer as the manifest describes it; `nnz` values of `dtype`.

    kernel: of a convolution; the manifests of 1x1 ones need not say it.
    """

    shape: tuple[int, int]
    pattern: str
    density: float
    requested_density: float | None
    dtype: str
    bias: bool
    nnz: int
    group: int | None = None
    zeros: bool = False
    sparse: bool = True
    outliers: int = 0
    kernel: tuple[int, int] | None = None
    nm: bool = False
    active: Active | None = None


@dataclass(frozen=True)
class Decided:
    """What serves a layer, packed or dense, and why, as it was where the folder was written.

    kernel: for batch sizes up to 8, None where the layer is dense. batches: for more. reason:
    why it is dense. decided: what chose. predicted: seconds by kernel, where latencies were measured.
    """

    shape: tuple[int, ...]
    density: float
    kernel: str | None
    batches: str
    reason: str | None
    decided: str
    predicted: dict[str, float]


def read_manifest(folder: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The checked content of gossamer.json; `layers` maps names to `PackedLayer`.

    `stored` maps names of tensors to `Stored`, `decisions` names of layers, packed and dense, to
    `Decided`, `files` names to their digests; each is empty where the folder does not hold it.
    `rebuild` says why the folder alone does not describe the model, None where it does. verify:
    whether the content must have the digest that it names. Raises FormatError for a missing,
    damaged or hostile file, or one of a newer version.
    """
    return parse_manifest(read_json(Path(folder), NAME), verify=verify)


def parse_manifest(data: dict[str, Any], *, verify: bool = True) -> dict[str, Any]:
    """`read_manifest` of the JSON that was read."""
    if data.get("format") != "gossamer":
        raise FormatError(f"{NAME}: format is {_short(data.get('format'))}, not 'gossamer'")
    version = data.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{NAME}: version is {_short(version)}, not a whole number from 1")
    if version > VERSION:
        raise FormatError(f"{NAME}: version {version} is newer than {VERSION}; upgrade gossamer")
    common = {"format", "version", "layers", "method", "provenance"}
    further = {"decisions"} | ({"stored", "files", "rebuild", "digest"} if version > 1 else set())
    _keys(data, common | (further & set(data)), NAME)
    own = digest_of_content(data) if verify and "digest" in data else None
    for key in ("layers", "provenance", "decisions", "stored", "files"):
        if not isinstance(data.setdefault(key, {}), dict):
            raise FormatError(f"{NAME}: {key} is an object")
    for key in ("method", "rebuild"):
        if data.setdefault(key, None) is not None and not isinstance(data[key], str):
            raise FormatError(f"{NAME}: {key} is a text or null")
    parsed = {
        "layers": {name: _layer(name, value) for name, value in data["layers"].items()},
        "decisions": {name: _decided(name, value) for name, value in data["decisions"].items()},
        "stored": {name: _stored(name, value) for name, value in data["stored"].items()},
        "files": {name: _file(name, value) for name, value in data["files"].items()},
    }
    if own is not None and own != data["digest"]:  # last: another reason says more
        raise FormatError(f"{NAME}: its content does not have the digest that it names; {HINT}")
    return {**data, **parsed}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a regular file inside the folder, at most 16 MB, no duplicate keys."""
    text = regular_file(folder, name, MAX_JSON).read_bytes()
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{name}: not valid JSON ({_one_line(error)})") from None
    if not isinstance(data, dict):
        raise FormatError(f"{name}: holds no JSON object")
    return data


def regular_file(folder: Path, name: str, largest: int | None = None) -> Path:
    """The path of `name`, a plain file name in the folder; raises FormatError for links, paths
    that leave the folder, missing files and files above `largest` bytes."""
    plain = isinstance(name, str) and name not in ("", ".", "..")
    if not plain or any(c in name for c in "/\\\0") or name.startswith("."):
        raise FormatError(f"{_short(name)} is not a plain file name")
    path = folder / name
    try:
        facts = path.stat() if _in_cache(path) else path.lstat()
    except (OSError, ValueError):
        raise FormatError(f"{name}: missing from {folder}") from None
    if not stat.S_ISREG(facts.st_mode):
        raise FormatError(f"{name}: not a regular file")
    if largest is not None and facts.st_size > largest:
        raise FormatError(f"{name}: {facts.st_size} bytes, more than the {largest} allowed")
    return path


def _in_cache(path: Path) -> bool:
    """A link as Hugging Face's cache makes them: from `snapshots/REVISION/NAME` into `blobs`."""
    if not path.is_symlink():
        return False
    blobs = path.parent.resolve().parent.parent / "blobs"
    cached = path.parent.resolve().parent.name == "snapshots"
    return cached and path.resolve().parent == blobs and not path.resolve().is_symlink()


def _layer(name: str, value: Any) -> PackedLayer:
    where = f"{NAME}: layer {_short(name)}"
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not an object")
    if value.get("storage") == "columns":
        return _active_layer(value, where)
    quantized = value.get("dtype") in QUANTIZED
    optional = {"kernel", "storage"} & set(value)
    further = {"group", "zeros", "sparse", "outliers"} if quantized else optional
    common = {"shape", "pattern", "density", "requested", "dtype", "bias", "nnz"}
    _keys(value, common | further, where)
    shape, nnz, dtype = value["shape"], value["nnz"], value["dtype"]
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
    if not whole or min(shape) < 1 or max(shape) >= 1 << 31:
        raise FormatError(f"{where}: shape is {_short(shape)}, not two whole numbers from 1")
    if type(nnz) is not int or not 0 <= nnz <= shape[0] * shape[1]:
        raise FormatError(f"{where}: nnz is {_short(nnz)}, which its shape cannot hold")
    if dtype not in DTYPES + QUANTIZED or type(value["bias"]) is not bool:
        raise FormatError(f"{where}: dtype or bias is not one of the known values")
    density, requested, pattern = value["density"], value["requested"], value["pattern"]
    for number in (density, 0.0 if requested is None else requested):
        if type(number) not in (int, float) or not 0 <= number <= 1:
            raise FormatError(f"{where}: a density is outside [0, 1]")
    if not isinstance(pattern, str):
        raise FormatError(f"{where}: pattern is not a text")
    parsed = _parsed(pattern, where)
    nm = "storage" in value and not quantized
    if nm and (value["storage"] != "nm" or not isinstance(parsed, NM) or "kernel" in value):
        raise FormatError(f"{where}: storage is 'nm', and its pattern N:M, or it is left out")
    plain = PackedLayer(
        (shape[0], shape[1]), pattern, density, requested, dtype, value["bias"], nnz, nm=nm
    )
    if "kernel" in further:
        return replace(plain, kernel=_kernel(value["kernel"], where))
    return replace(plain, **_quantized(value, nnz, where)) if quantized else plain


def _active_layer(value: dict[str, Any], where: str) -> PackedLayer:
    """A layer stored as columns, whose inputs are chosen."""
    common = {"shape", "pattern", "density", "requested", "dtype", "bias", "nnz"}
    _keys(value, common | {"storage", "activations"}, where)
    kind = "float32" if value["dtype"] == "int8" else value["dtype"]  # checked as any other
    plain = _layer(where, {**{key: value[key] for key in common}, "dtype": kind})
    told, (out, width) = value["activations"], plain.shape
    if not isinstance(told, dict):
        raise FormatError(f"{where}: activations is an object")
    one = {"threshold"} & set(told) or {"fraction"}
    _keys(told, {"by", "kept", "norms", "rank", "turns", "across", "facts"} | one, where)
    try:
        limit: Any = told.get("threshold", told.get("fraction"))
        budget = (Threshold if "threshold" in told else Fraction)(limit)
    except UsageError as error:
        raise FormatError(f"{where}: {_one_line(error)}") from None
    flags = type(told["norms"]) is bool and type(told["across"]) is bool
    texts = type(told["by"]) is str and (told["turns"] is None or type(told["turns"]) is str)
    rank = type(told["rank"]) is int and 0 <= told["rank"] <= min(out, width)
    kept = type(told["kept"]) in (int, float) and 0 < told["kept"] <= 1
    facts = isinstance(told["facts"], dict) and all(
        type(n) in (int, float) for n in told["facts"].values()
    )
    if not (flags and texts and rank and kept and facts) or plain.nnz != out * width:
        raise FormatError(f"{where}: says of its inputs what cannot be")
    active = Active(
        told["by"], told["kept"], budget, told["norms"], told["rank"], told["turns"],
        told["across"], told["facts"],
    )  # fmt: skip
    return replace(plain, dtype=value["dtype"], active=active)


def _stored(name: str, value: Any) -> Stored:
    where = f"{NAME}: stored {_short(name)}"
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not an object")
    _keys(value, {"shape", "dtype", "nnz", "served"}, where)
    shape, nnz, dtype = value["shape"], value["nnz"], value["dtype"]
    whole = isinstance(shape, list) and 2 <= len(shape) <= 8 and all(type(n) is int for n in shape)
    if not whole or min(shape) < 1 or max(shape) >= 1 << 48 or prod(shape) >= 1 << 48:
        raise FormatError(f"{where}: shape is {_short(shape)}, not whole numbers from 1")
    if type(nnz) is not int or not 0 <= nnz <= prod(shape):
        raise FormatError(f"{where}: nnz is {_short(nnz)}, which its shape cannot hold")
    if not isinstance(dtype, str) or dtype not in STORABLE or type(value["served"]) is not bool:
        raise FormatError(f"{where}: dtype or served is not one of the known values")
    return Stored(tuple(shape), dtype, nnz, value["served"])


def _file(name: str, value: Any) -> dict[str, Any]:
    where = f"{NAME}: file {_short(name)}"
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not an object")
    kind = "sums" if name.endswith(".safetensors") else "sha256"
    _keys(value, {"bytes", kind}, where)
    if type(value["bytes"]) is not int or not isinstance(value[kind], str):
        raise FormatError(f"{where}: a number of bytes and a digest are needed")
    parts = name.split("/")  # a tokenizer may have folders of its own
    if any(part.startswith(".") or not part or set(part) & set("\\\0") for part in parts):
        raise FormatError(f"{where}: not the name of a file in the folder")
    return value


def _decided(name: str, value: Any) -> Decided:
    where = f"{NAME}: decision on {_short(name)}"
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not an object")
    _keys(value, {field.name for field in fields(Decided)}, where)
    shape, density, predicted = value["shape"], value["density"], value["predicted"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int for n in shape):
        raise FormatError(f"{where}: shape is {_short(shape)}, not two whole numbers")
    if type(density) not in (int, float) or not 0 <= density <= 1:
        raise FormatError(f"{where}: density is outside [0, 1]")
    if not isinstance(predicted, dict):
        raise FormatError(f"{where}: predicted is an object")
    texts = [value["batches"], value["decided"], *predicted]
    texts += [value[key] for key in ("kernel", "reason") if value[key] is not None]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise FormatError(f"{where}: holds something else than printable text")
    if not all(type(n) in (int, float) and 0 <= n < 1e9 for n in predicted.values()):
        raise FormatError(f"{where}: predicted holds something else than seconds")
    return Decided(**{**value, "shape": tuple(shape)})


def _kernel(value: Any, where: str) -> tuple[int, int]:
    whole = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
    if not whole or min(value) < 1 or max(value) >= 1 << 16:
        raise FormatError(f"{where}: kernel is {_short(value)}, not two whole numbers from 1")
    return value[0], value[1]


def _parsed(pattern: str, where: str) -> Pattern | None:
    try:
        return parse_pattern(pattern) if pattern else None
    except PatternError as error:
        raise FormatError(f"{where}: {_one_line(error)}") from None


def _quantized(value: dict[str, Any], nnz: int, where: str) -> dict[str, Any]:
    """The keys that only quantised layers have."""
    group, outliers = value["group"], value["outliers"]
    power = type(group) is int and 64 <= group < 1 << 31 and group & (group - 1) == 0
    if not power:
        raise FormatError(f"{where}: group is {_short(group)}, not a power of two from 64 on")
    if type(outliers) is not int or not 0 <= outliers <= nnz:
        raise FormatError(f"{where}: outliers is {_short(outliers)}, which nnz cannot hold")
    if type(value["zeros"]) is not bool or type(value["sparse"]) is not bool:
        raise FormatError(f"{where}: zeros and sparse are true or false")
    return {key: value[key] for key in ("group", "zeros", "sparse", "outliers")}


def _keys(data: dict[str, Any], wanted: set[str], where: str) -> None:
    if set(data) != wanted:
        extra, missing = sorted(set(data) - wanted), sorted(wanted - set(data))
        what = f"unknown key {_short(extra[0])}" if extra else f"no key {missing[0]!r}"
        raise FormatError(f"{where}: {what}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not allowed")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
