"""Writing a model: packed layers as values and bitmap, everything else under its own name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.files import write_safetensors
from gossamer.core.result import CompressResult, LayerRecord, PruneResult, unwrap
from gossamer.io.atomic import new_folder
from gossamer.io.manifest import NAME, VERSION, Decided
from gossamer.io.tensors import INDEX, SINGLE
from gossamer.nn import NMLinear, PackedConv2d, QuantizedLinear
from gossamer.nn.serving import Packed, serves

SHARD = 4 << 30
"""Largest safetensors file, in bytes; more tensors go to further shards with an index."""


def save(
    model: nn.Module | PruneResult | CompressResult,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `model` to a new folder, all of it or nothing, and return the folder.

    A Hugging Face model brings its config.json, a tokenizer its own files. The result of `compress`
    brings why each layer is packed or dense, which `gossamer inspect` shows. Raises UsageError when
    the folder is not empty and `overwrite` is not set, OSError when the disk is full.
    """
    target, root = Path(folder), unwrap(model)
    records = model.layers if isinstance(model, CompressResult) else ()
    facts = dict(model.provenance) if isinstance(model, PruneResult) else {}
    facts.update(provenance or {})
    method = facts.pop("method", None)
    packed = {name: module for name, module in root.named_modules() if isinstance(module, Packed)}
    with new_folder(target, overwrite) as place:
        write_config(root, place, tokenizer)
        write_tensors(distinct(root), place)
        manifest = {
            "format": "gossamer",
            "version": VERSION,
            "layers": {name: _describe(module) for name, module in packed.items()},
            "decisions": _decisions(packed, records),
            "method": None if method is None else str(method),
            "provenance": json.loads(json.dumps(facts, default=str)),
        }
        (place / NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    return target


def _decisions(packed: Mapping[str, Packed], records: Iterable[LayerRecord]) -> dict[str, Any]:
    """By layer: what serves it here and, as far as `compress` recorded it, why."""
    found = {}
    for record in records:
        kernel = record.kernel and record.kernel.partition(" + ")[0]
        found[record.name] = Decided(
            record.shape, record.density, kernel, record.batches, record.reason, record.decided,
            dict(record.predicted),
        )  # fmt: skip
    for name, layer in packed.items():
        kernel, batches = serves(layer)
        shape = (layer.out_features, layer.in_features)
        bare = Decided(shape, layer.density, kernel, batches, None, "", {})
        found.setdefault(name, bare)
    return {name: asdict(decided) for name, decided in found.items()}


def write_config(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """config.json, generation_config.json and the tokenizer, as Hugging Face writes them."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
        config.dtype = next((p.dtype for p in model.parameters()), torch.float32)
        config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "save_pretrained"):
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors once, under their first name."""
    seen: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    result = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and key in seen:
            continue
        seen[key] = name
        result[name] = tensor.detach().contiguous().clone() if _shares(tensor) else tensor.detach()
    return result


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """One safetensors file, or shards of at most `SHARD` bytes with Hugging Face's index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        width = tensor.numel() * tensor.element_size()
        if shards[-1] and size + width > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size, total = size + width, total + width
    if len(shards) == 1:
        write_safetensors(shards[0], folder / SINGLE, {"format": "pt"})
        return
    places = {}
    for index, shard in enumerate(shards, 1):
        name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(shard, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
    content = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _shares(tensor: Tensor) -> bool:
    """A view into a larger storage, which safetensors refuses."""
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _describe(layer: Packed) -> dict[str, Any]:
    if isinstance(layer, QuantizedLinear):
        return _describe_quantized(layer)
    further = {"kernel": list(layer.window.kernel)} if isinstance(layer, PackedConv2d) else {}
    return further | {
        "shape": [layer.out_features, layer.in_features],
        "pattern": layer.pattern,
        "density": layer.density,
        "requested": layer.density_requested,
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
        "requested": layer.density_requested,
        "dtype": f"int{layer.bits}",
        "bias": layer.bias is not None,
        "nnz": layer.kept,
        "group": layer.group,
        "zeros": matrix.zeros is not None,
        "sparse": layer.sparse,
        "outliers": 0 if matrix.outliers is None else matrix.outliers[1].numel(),
    }
