"""Writing a model: whatever has zeros as values and bitmap, everything else under its own name."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.budget import Threshold
from gossamer.core.errors import FormatError, UsageError
from gossamer.core.files import write_safetensors
from gossamer.core.matrix import as_matrix
from gossamer.core.result import CompressResult, LayerRecord, PruneResult, unwrap
from gossamer.io.atomic import check_target, new_folder
from gossamer.io.card import README, model_card
from gossamer.io.digests import digest_of, digest_of_content
from gossamer.io.fill import check_tensors, reasons_of
from gossamer.io.manifest import NAME, VERSION, Decided, _one_line
from gossamer.io.names import check_savable, plain_names
from gossamer.io.skeleton import CONFIG, GENERATION, outline, read_config
from gossamer.io.stored import BITMAP, VALUES, pack
from gossamer.io.tensors import INDEX, PACKED, PLAIN, SHARD, SINGLE
from gossamer.nn import ActiveLinear, NMLinear, PackedConv2d, QuantizedLinear
from gossamer.nn.foldable import Foldable
from gossamer.nn.kernel_choice.decide import SLOWER
from gossamer.nn.serving import Packed, serves

LARGEST = 4 << 30
"""Largest safetensors file, in bytes; more tensors go to further shards with an index."""
METHOD = "gossamer"
"""What config.json names as quant_method: the quantizer that transformers looks for."""
UNKNOWN = "none: this folder is packed by Gossamer; `import gossamer` first, then load it again"
"""What a config.json calls its weight file, which every loader without Gossamer then names."""
_LOG = logging.getLogger("gossamer")


def save(
    model: nn.Module | PruneResult | CompressResult,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    readme: bool = True,
) -> Path:
    """Write `model` to a new folder, all of it or nothing, and return the folder.

    A Hugging Face model brings its config.json, and a tokenizer its own files. The result of
    `compress` brings why each layer is packed or dense, which `gossamer inspect` shows. Every
    tensor with enough zeros is stored as its other numbers, whatever serves it in memory. What
    torch.compile, DataParallel or DDP wrap is written under its own names.

    Whether `load` can rebuild the model from the folder is tried before anything is written. Where
    it cannot, gossamer.json and a logged warning say why, and `load` needs `model=`.

    Parameters
    ----------
    model : nn.Module, PruneResult or CompressResult
        Left as it is.
    folder : path
        The new folder.
    tokenizer : optional
        Anything with `save_pretrained`.
    provenance : mapping, optional
        What gossamer.json says of how the zeros came about.
    overwrite : bool
        Replace a folder that is not empty.
    readme : bool
        Whether a sparse model of transformers or diffusers gets a README.md, the card that the Hub
        shows.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    UsageError
        When the folder is not empty and `overwrite` is not set. For what cannot be written:
        layers of `replace_layers` that are not folded, adapters of peft that are not merged,
        sharded models, tensors without numbers.
    OSError
        When the disk is full.

    Examples
    --------
    >>> import gossamer as gs, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    >>> fast = gs.compress(gs.prune(model, "magnitude", density=0.2), latency="rule")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in gs.save(fast, folder, overwrite=True).iterdir())
    ['gossamer.json', 'gossamer.safetensors']
    """
    target, root = Path(folder), _root(model)
    check_target(target, overwrite)
    plain = plain_names(root)
    modules = dict(root.named_modules())
    _check_folded(modules)
    packed = {plain(name): each for name, each in modules.items() if isinstance(each, Packed)}
    records = model.layers if isinstance(model, CompressResult) else ()
    decisions = _decisions(root, packed, records, plain)
    tensors = {plain(name): tensor for name, tensor in distinct(root).items()}
    present = {name: (tuple(t.shape), t.is_floating_point()) for name, t in tensors.items()}
    stored = _store(tensors, packed, decisions)
    facts = dict(model.provenance) if isinstance(model, PruneResult) else {}
    facts.update(provenance or {})
    method = facts.pop("method", None)
    manifest = {
        "format": "gossamer",
        "version": VERSION if any(isinstance(x, ActiveLinear) for x in packed.values()) else 2,
        "layers": {name: _describe(module) for name, module in packed.items()},
        "stored": stored,
        "decisions": decisions,
        "method": None if method is None else str(method),
        "provenance": json.loads(json.dumps(facts, default=str)),
    }
    with new_folder(target, overwrite) as place:
        weights = write_tensors(tensors, place, PACKED if packed or stored else PLAIN)
        write_config(root, place, tokenizer, weights if packed or stored else None)
        manifest["rebuild"] = _why_not_rebuilt(place, packed, present)
        if readme and (packed or stored) and (place / CONFIG).exists():
            outside = {name: f[0] for name, f in present.items() if not _inside(name, packed)}
            (place / README).write_text(model_card(manifest, outside, type(root).__name__))
        write_manifest(manifest, place)
    if manifest["rebuild"] is not None:
        level = logging.WARNING if hasattr(root, "config") else logging.INFO
        _LOG.log(level, "%s: gossamer.load needs model= (%s)", target, manifest["rebuild"])
    return target


def save_inside(
    model: nn.Module | PruneResult | CompressResult, place: Path, **options: Any
) -> None:
    """`save` into a folder that is being filled, such as `new_folder` gives."""
    inner = place / "model"
    save(model, inner, **options)
    for path in list(inner.iterdir()):
        path.rename(place / path.name)
    inner.rmdir()


def _check_folded(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, Foldable):
            raise UsageError(
                f"{name}: a {type(module).__name__} has no place in a folder; call "
                "gs.fold_layers(model) first, or keep the model's state_dict()"
            )


def _root(model: Any) -> nn.Module:
    if not isinstance(model, PruneResult | CompressResult):
        check_savable(model)
    root = unwrap(model)
    check_savable(root)
    return root


def write_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """gossamer.json, with the digest of every other file in the folder and of its own content.

    README.md has none: it is there to be edited.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != README)
    manifest["files"] = {path.relative_to(folder).as_posix(): digest_of(path) for path in paths}
    manifest["digest"] = digest_of_content(json.loads(json.dumps(manifest)))
    (folder / NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def _why_not_rebuilt(
    folder: Path, packed: Mapping[str, Packed], present: Mapping[str, tuple[tuple[int, ...], bool]]
) -> str | None:
    """Why config.json does not describe the model that was saved beside it, None where it does."""
    if not (folder / CONFIG).exists():
        return "it is no model of transformers or diffusers, so nothing says how to build it"
    outside = {name: facts for name, facts in present.items() if not _inside(name, packed)}
    try:
        drawn = outline(read_config(folder))
        check_tensors(drawn, packed, outside)
    except (FormatError, UsageError) as error:
        return _one_line(error)
    absent = sorted(packed.keys() - {name for name, _ in drawn.named_modules()})
    return f"layer {absent[0]}: not part of the model" if absent else None


def _inside(name: str, layers: Iterable[str]) -> bool:
    """Whether a tensor belongs to one of the layers."""
    return name.rpartition(".")[0] in layers


def _store(
    tensors: dict[str, Tensor], packed: Mapping[str, Packed], decisions: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace tensors that are smaller so by their parts; returns what the manifest says of them."""
    found: dict[str, Any] = {}
    for name in list(tensors):
        if _inside(name, packed) or (parts := pack(tensors[name])) is None:
            continue
        tensor = tensors.pop(name)
        tensors[name + VALUES], tensors[name + BITMAP] = parts
        reason = decisions.get(name.removesuffix(".weight"), {}).get("reason")
        found[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "nnz": parts[0].numel(),
            "served": bool(reason) and str(reason).startswith(SLOWER),
        }
    return found


def _decisions(
    root: nn.Module,
    packed: Mapping[str, Packed],
    records: Iterable[LayerRecord],
    plain: Callable[[str], str],
) -> dict[str, Any]:
    """By layer: what serves it here and, as far as `compress` or `load` recorded it, why."""
    found = {}
    for record in records:
        kernel = record.kernel and record.kernel.partition(" + ")[0]
        found[plain(record.name)] = Decided(
            record.shape, record.density, kernel, record.batch_kernel, record.reason, record.decided,
            dict(record.predicted),
        )  # fmt: skip
    for name, layer in packed.items():
        kernel, batches = serves(layer)
        shape = (layer.out_features, layer.in_features)
        bare = Decided(shape, layer.density, kernel, batches, None, "", {})
        found.setdefault(name, bare)
    for name, reason in reasons_of(root).items():
        matrix = as_matrix(root.get_submodule(name))
        density = int(matrix.count_nonzero()) / max(1, matrix.numel())
        bare = Decided(tuple(matrix.shape), density, None, "", reason, "", {})
        found.setdefault(plain(name), bare)
    return {name: asdict(decided) for name, decided in found.items()}


def write_config(
    model: nn.Module, folder: Path, tokenizer: Any, weights: str | None = None
) -> None:
    """config.json, generation_config.json and the tokenizer, as Hugging Face writes them.

    weights: the file of weights that Gossamer alone can read, which config.json then says.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        _write_structure(model, copy.deepcopy(config), folder, weights)
    elif hasattr(model, "save_config"):  # of diffusers
        model.save_config(folder)  # type: ignore[operator]
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        # not save_pretrained, which refuses values that many published models have
        (folder / GENERATION).write_text(generation.to_json_string() + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_structure(model: nn.Module, config: Any, folder: Path, weights: str | None) -> None:
    config.architectures = [type(model).__name__]
    config.dtype = next((p.dtype for p in model.parameters()), torch.float32)
    for name in ("quantization_config", "transformers_weights"):
        if hasattr(config, name):
            delattr(config, name)
    try:
        config.save_pretrained(folder)
    except Exception as error:  # what transformers will not write it may still read
        _LOG.warning("config.json is written unchecked: %s", _one_line(error))
        (folder / CONFIG).write_text(config.to_json_string())
    if weights is not None:
        facts = json.loads((folder / CONFIG).read_text())
        facts["quantization_config"] = {"quant_method": METHOD, "weights": weights}
        facts["transformers_weights"] = UNKNOWN
        (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors once, under their first name, none sharing memory."""
    seen, storages = set(), set()
    result = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{name} is a {type(tensor).__name__}: only tensors can be saved")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        storage, plain = tensor.untyped_storage(), tensor.detach()
        whole = storage.nbytes() == plain.numel() * plain.element_size()
        shares = bool(storage.nbytes()) and storage.data_ptr() in storages
        storages.add(storage.data_ptr())
        result[name] = plain.contiguous() if whole and not shares else plain.clone().contiguous()
    return result


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, name: str = PLAIN) -> str:
    """One safetensors file, or shards of at most `LARGEST` bytes with Hugging Face's index.

    Returns the name of the file, or of the index.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for key, tensor in tensors.items():
        width = tensor.numel() * tensor.element_size()
        if shards[-1] and size + width > LARGEST:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.contiguous()
        size, total = size + width, total + width
    if len(shards) == 1:
        write_safetensors(shards[0], folder / SINGLE.format(name), {"format": "pt"})
        return SINGLE.format(name)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = SHARD.format(name, number, len(shards))
        write_safetensors(shard, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(shard, file))
    content = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX.format(name)).write_text(json.dumps(content, indent=2) + "\n")
    return INDEX.format(name)


def _describe(layer: Packed) -> dict[str, Any]:
    if isinstance(layer, ActiveLinear):
        return _describe_active(layer)
    if isinstance(layer, QuantizedLinear):
        return _describe_quantized(layer)
    further = {"kernel": list(layer.window.kernel)} if isinstance(layer, PackedConv2d) else {}
    return further | {
        "shape": [layer.out_features, layer.in_features],
        "pattern": layer.pattern,
        "density": layer.density,
        "requested": layer.requested_density,
        "dtype": str(layer.values.dtype).removeprefix("torch."),
        "bias": layer.bias is not None,
        "nnz": layer.kept if isinstance(layer, NMLinear) else layer.values.numel(),
        **({"storage": "nm"} if isinstance(layer, NMLinear) else {}),
    }


def _describe_quantized(layer: QuantizedLinear) -> dict[str, Any]:
    matrix = layer.matrix
    return {
        "shape": [layer.out_features, layer.in_features],
        "pattern": layer.pattern,
        "density": layer.density,
        "requested": layer.requested_density,
        "dtype": f"int{layer.bits}",
        "bias": layer.bias is not None,
        "nnz": layer.kept,
        "group": layer.group,
        "zeros": matrix.zeros is not None,
        "sparse": layer.sparse,
        "outliers": 0 if matrix.outliers is None else matrix.outliers[1].numel(),
    }


def _describe_active(layer: ActiveLinear) -> dict[str, Any]:
    budget = layer.budget
    limit = (
        {"threshold": budget.value}
        if isinstance(budget, Threshold)
        else {"fraction": budget.fraction}
    )
    return {
        "shape": [layer.out_features, layer.in_features],
        "pattern": "",
        "density": 1.0,
        "requested": None,
        "dtype": str(layer.values.dtype).removeprefix("torch."),
        "bias": layer.bias is not None,
        "nnz": layer.values.numel(),
        "storage": "columns",
        "activations": {
            "by": layer.by,
            "kept": layer.kept_inputs,
            **limit,
            "norms": layer.norms is not None,
            "rank": 0 if layer.down is None else layer.down.shape[0],
            "turns": layer.leads if layer.rotation is not None else None,
            "across": layer.scales is not None and layer.scales.shape[0] == 1,
            "facts": layer.facts,
        },
    }
