"""An ordinary dense checkpoint with zeros in it, for every reader that does not know Gossamer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.io.atomic import check_target, new_folder
from gossamer.io.load import load
from gossamer.io.manifest import NAME, read_manifest
from gossamer.io.names import check_savable, plain_names
from gossamer.io.save import distinct, write_config, write_tensors
from gossamer.io.skeleton import CONFIG
from gossamer.io.tensors import PLAIN
from gossamer.nn.packed.base import PackedLayer

DIFFUSERS = "diffusion_pytorch_model"
_BESIDE = frozenset({
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json",
})  # fmt: skip
"""Files of tokenizers, processors and SentenceTransformer that go along, besides `*token*`."""
_STEP = re.compile(r"[0-9]+_[A-Za-z]+")
"""Folders of SentenceTransformer, one for each step behind the encoder, as `1_Pooling`."""


def export(
    source: str | Path | nn.Module | PruneResult | CompressResult,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    dense: bool = True,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Turn a packed model into an ordinary masked checkpoint that plain loaders read.

    What transformers or diffusers described is written for their `from_pretrained`, with the
    tokenizer and the other files that belong to it. Of other modules model.safetensors holds the
    state dict. It takes the memory of the dense weights.

    Parameters
    ----------
    source : path, nn.Module, PruneResult or CompressResult
        A folder that `save` wrote, or a model in memory, which stays as it is.
    out : path
        The new folder.
    model : nn.Module, optional
        An instance to fill, for a folder that does not describe its model (plain modules, timm).
    dense : bool
        Must be True: other forms do not exist yet.
    overwrite : bool
        Replace a folder that is not empty.
    verify : bool
        Compare every file with its digest first.

    Raises
    ------
    FormatError, UsageError
        As `load` and `save`.

    Examples
    --------
    >>> import gossamer as gs, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    >>> fast = gs.compress(gs.prune(model, "magnitude", density=0.2), latency="rule")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in gs.export(fast, folder, overwrite=True).iterdir())
    ['model.safetensors']
    """
    if not dense:
        raise UsageError("only dense=True can be exported")
    check_target(Path(out), overwrite)
    folder = Path(source) if isinstance(source, str | Path) else None
    if folder is not None:
        root = _loaded(folder, model, verify)
    elif model is not None:
        raise UsageError("model= is for a folder; here the model itself is given")
    else:
        root = unwrap(source)  # type: ignore[arg-type]
        check_savable(root)
    tensors = dense_state(root)
    with new_folder(Path(out), overwrite) as place:
        write_config(root, place, None)
        if folder is not None:
            _copy_beside(folder, place)
        name = DIFFUSERS if hasattr(root, "save_config") else PLAIN
        write_tensors(tensors, place, name)
    return Path(out)


def _loaded(folder: Path, model: nn.Module | None, verify: bool) -> nn.Module:
    if not (folder / NAME).exists():
        raise UsageError(f"{folder} holds no {NAME}; it is already an ordinary folder")
    read_manifest(folder, verify=verify)
    return load(folder, model=model, latency="rule", verify=verify)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model had before its layers were packed."""
    plain = plain_names(model)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLayer)}
    hidden = {f"{name}.{part}" for name, layer in packed.items() for part in layer._buffers}
    state = {plain(key): value for key, value in distinct(model).items() if key not in hidden}
    return state | {f"{plain(key)}.weight": each.dense_weight() for key, each in packed.items()}


def _copy_beside(source: Path, target: Path) -> None:
    """What belongs to the model besides its weights; links are never followed."""
    for path in sorted(source.iterdir()):
        if path.is_symlink() or path.name in (CONFIG, NAME):
            continue
        if path.is_file() and ("token" in path.name or path.name in _BESIDE):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and _STEP.fullmatch(path.name):
            (target / path.name).mkdir()
            for inner in sorted(path.iterdir()):
                if inner.is_file() and not inner.is_symlink():
                    shutil.copyfile(inner, target / path.name / inner.name)
