"""Reading a folder back: packed layers take their places in the model its config describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.result import unwrap
from gossamer.io.digests import changed
from gossamer.io.digests import check as check_files
from gossamer.io.fill import Content, check, convert, fill
from gossamer.io.layers import packed_layer, share_rotations
from gossamer.io.manifest import NAME, _one_line, read_manifest
from gossamer.io.skeleton import (
    LARGEST_BUFFERS,
    class_of,
    computed_bytes,
    outline,
    read_config,
    read_generation,
    skeleton,
)
from gossamer.io.stored import take
from gossamer.io.tensors import read_tensors
from gossamer.nn import serves_large_batches
from gossamer.nn.chain import fuse
from gossamer.nn.kernel_choice.decide import choose_forms, prepare_where_it_pays
from gossamer.nn.kernel_choice.latency import Predictor
from gossamer.nn.kernel_choice.machine import known_latency, use_latency


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    large_batches: bool | None = None,
    latency: Predictor | Literal["rule"] | None = None,
    verify: bool = True,
) -> nn.Module:
    """Load a folder that `save` wrote: the model in eval mode, packed layers behind their kernels.

    A Hugging Face folder rebuilds itself from its config, by the class that transformers has under
    the config's name. Code from the folder is never run. A folder without gossamer.json loads as an
    ordinary dense model. Any other module must be passed as `model`.

    Parameters
    ----------
    folder : path
        As `save` or Hugging Face wrote it.
    model : nn.Module, optional
        An instance of the same structure, filled in place once everything has been checked.
    dtype : torch.dtype, optional
        Convert floating tensors.
    large_batches : bool, optional
        Also build the form that serves larger batch sizes, as `compress` does, in the layers where
        it is predicted to be the fastest. Each packed layer's `large_batches_decided` says what was
        predicted. By default for models that do not generate text.
    latency : LatencyModel or "rule", optional
        What the prediction goes by. By default what `calibrate_latency` measured on this machine.
        Where it did not, every distinct shape is timed now, in up to 3 seconds. Where the dense
        product is predicted to be the fastest, a layer gets its dense weight, and its
        `dense_reason` says why. "rule": nothing is timed, and every layer gets the form.
    verify : bool
        Compare every file with the digest in gossamer.json, where it holds any.

    Returns
    -------
    nn.Module
        An ordinary module.

    Raises
    ------
    FormatError
        For anything wrong with the files.
    UsageError
        Where `model` is missing.

    Examples
    --------
    >>> import gossamer as gs, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    >>> fast = gs.compress(gs.prune(model, "magnitude", density=0.2), latency="rule")
    >>> fresh = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = gs.load(gs.save(fast, folder), model=fresh, latency="rule")
    >>> x = torch.randn(1, 256)
    >>> torch.equal(again(x), fast.model(x))
    True
    """
    place = Path(folder)
    if not place.is_dir():
        raise UsageError(f"{place} is not a folder; give one that gossamer or transformers wrote")
    ours = (place / NAME).exists() or (place / NAME).is_symlink()
    content = read_content(place, verify, model is not None)
    measured = known_latency(latency)
    if model is not None:
        root = unwrap(model)
        check(root, content)
        fill(root, content, measured, serves_large_batches(root, large_batches))
    else:
        root = _rebuilt(place, content, ours, measured, large_batches)
    if dtype is not None:
        convert(root, dtype)
    return prepare(root, measured, large_batches)


def prepare(root: nn.Module, latency: Predictor | None, large_batches: bool | None) -> nn.Module:
    """Build what serves the packed layers of a model that holds them, and set it to eval mode."""
    fuse(root)
    use_latency(root, latency)
    many = serves_large_batches(root, large_batches)
    choose_forms(root, latency, many)
    if many:
        prepare_where_it_pays(root, latency)
    return root.eval()


def read_content(folder: Path, verify: bool, given: bool = False) -> Content:
    """Everything in the folder's files, each packed layer checked by itself.

    given: whether the module to fill is there, so that the folder need not describe it.
    """
    if not (folder / NAME).exists() and not (folder / NAME).is_symlink():
        return Content({}, {}, read_tensors(folder))
    manifest = read_manifest(folder, verify=verify)
    if manifest["rebuild"] is not None and not given:
        raise UsageError(
            f"{folder} does not describe its model by itself ({manifest['rebuild']}): pass model=, "
            "an instance to fill"
        )
    if verify:
        check_files(folder, manifest["files"])
    tensors, packed = read_tensors(folder), manifest["layers"]
    parts = take(manifest["stored"], tensors)
    layers = {name: packed_layer(name, facts, tensors) for name, facts in packed.items()}
    share_rotations(layers)
    kernels = {name: facts.kernel for name, facts in packed.items()}
    return Content(layers, kernels, tensors, manifest["stored"], parts)


def verify(folder: str | Path) -> list[str]:
    """What is wrong with the files of a folder that `save` wrote, a line each; empty if nothing.

    Every file is compared with its digest in gossamer.json, and gossamer.json with its own; files
    that were added later do not count. No weight is unpacked.
    """
    place = Path(folder)
    try:
        manifest = read_manifest(place)
    except FormatError as error:
        return [str(error)]
    if not manifest["files"]:
        return [f"{NAME}: holds no digests, as an older version wrote it; save the model again"]
    found = (changed(place, name, expected) for name, expected in manifest["files"].items())
    return [problem for problem in found if problem is not None]


def _rebuilt(
    folder: Path,
    content: Content,
    ours: bool,
    latency: Predictor | None,
    large_batches: bool | None,
) -> nn.Module:
    """The model that config.json describes, filled."""
    config = read_config(folder, len(content.tensors) + len(content.layers) + len(content.stored))
    try:
        drawn = outline(config)
        check(drawn, content)
    except FormatError:
        if ours:
            raise
        return _ordinary(folder, class_of(config))
    if computed_bytes(drawn) > LARGEST_BUFFERS:
        raise FormatError("config.json: asks for more computed buffers than any model has")
    root = skeleton(config)
    read_generation(folder, root)
    fill(root, content, latency, serves_large_batches(root, large_batches))
    return root


def _ordinary(folder: Path, kind: Any) -> nn.Module:
    """A checkpoint whose names transformers translates; nothing may be left to chance."""
    try:
        root, info = kind.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise FormatError(f"{folder}: {type(error).__name__}: {_one_line(error)}") from None
    absent = sorted(info["missing_keys"]) or [str(key) for key in info["mismatched_keys"]]
    if absent:
        raise FormatError(f"tensor {absent[0]}: missing from the files or of another shape")
    assert isinstance(root, nn.Module)
    return root
