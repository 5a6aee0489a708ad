"""transformers loads and writes packed folders by itself, through its interface for quantizers.

`AutoModel.from_pretrained`, pipelines, SentenceTransformer and whatever else calls `from_pretrained`
read what `gossamer.save` wrote; `save_pretrained` of a packed model writes such a folder.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.io.card import README
from gossamer.io.digests import check as check_files
from gossamer.io.fill import convert, serve, serve_dense
from gossamer.io.layers import packed_layer
from gossamer.io.load import prepare
from gossamer.io.manifest import NAME, PackedLayer, read_manifest
from gossamer.io.save import METHOD, save
from gossamer.io.stored import BITMAP, VALUES, Stored, unpack
from gossamer.io.tensors import INDEX, PACKED, SINGLE, check_header
from gossamer.nn.kernel_choice.machine import known_latency
from gossamer.nn.packed.bitmap import serves_large_batches
from gossamer.nn.serving import Packed

try:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils import cached_file
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError:
    raise MissingExtra("transformers", "hf") from None

WEIGHTS = (SINGLE.format(PACKED), INDEX.format(PACKED))
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
           "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
           "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


def register() -> None:
    """Make transformers know packed folders; once is enough, `import gossamer` does it."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(GossamerConfig)
    register_quantizer(METHOD)(GossamerQuantizer)
    PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)


class GossamerConfig(QuantizationConfigMixin):
    """What config.json says of a packed folder: which file holds the weights."""

    def __init__(self, weights: str | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.weights = weights if weights in WEIGHTS else None


class _Awaited(nn.Module):
    """Stands where a packed layer will be, for the loader to fill with the file's tensors."""

    def __init__(self, kept: nn.Module, facts: PackedLayer, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.facts = facts
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        self.replaced = [kept]  # in a list: not part of the model meanwhile

    @property
    def weight(self) -> Tensor:
        """That of the layer replaced: what a parent would fill with random numbers meanwhile."""
        weight = self.replaced[0].weight
        assert isinstance(weight, Tensor)
        vars(weight)["_is_hf_initialized"] = True
        return weight

    def __getattr__(self, name: str) -> Any:
        """Else that of the layer replaced, such as its widths, for a parent that asks meanwhile."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "replaced":
                raise
            return getattr(self.replaced[0], name)


class GossamerQuantizer(HfQuantizer):
    """Puts packed layers in their places while transformers loads everything else."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored: dict[str, Stored] = {}
        self.dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise UsageError where packed layers would be moved off the CPU."""
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if any(str(place) != "cpu" for place in places):
            raise UsageError(
                "packed layers run on the CPU: leave device_map out, or turn the folder into an "
                "ordinary one by gossamer.export"
            )

    def update_dtype(self, dtype: Any) -> Any:
        """Packed values get the dtype of the model, as every other tensor."""
        self.dtype = dtype
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Everything on the CPU, whatever else is there."""
        return None if device_map is None else {"": "cpu"}

    def update_attn_implementation(self, config: Any) -> Any:
        """The real name of the weight file, in the place of the one that tells other loaders."""
        if self.quantization_config.weights is not None:
            config.transformers_weights = self.quantization_config.weights
        elif hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise UsageError("a packed folder is loaded from its files, not from a state_dict")
        files = [Path(file) for file in checkpoint_files]
        place = _place_of(files[0], model.config.name_or_path)
        manifest = read_manifest(place)
        check_files(place, _readable(place, manifest["files"]))
        self.stored = manifest["stored"]
        known = {key: value for file in files for key, value in check_header(file).items()}
        for name, facts in manifest["layers"].items():
            if (there := _name_in(model, name)) is not None:
                parts = dict(_parts(name, known))
                model.set_submodule(there, _Awaited(model.get_submodule(there), facts, parts))

    def get_weight_conversions(self) -> list[Any]:
        """Stored tensors are made dense while they are loaded."""
        if not self.stored:
            return []
        sources = [f"{VALUES}$", f"{BITMAP}$"]
        return [WeightConverter(sources, "", [_Unpack(self.stored)])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        latency, large_batches = known_latency(None), serves_large_batches(model)
        tensors: dict[str, Tensor] = {}
        for name, awaited in list(model.named_modules()):
            if isinstance(awaited, _Awaited):
                parts = {f"{name}.{part}": t for part, t in awaited.named_buffers(recurse=False)}
                layer = packed_layer(name, awaited.facts, parts)
                if self.dtype in (torch.float32, torch.bfloat16):
                    convert(layer, self.dtype)
                model.set_submodule(name, awaited.replaced[0])
                serve(model, name, layer, tensors, latency, large_batches)
        for name, facts in self.stored.items():
            there = _name_in(model, name.removesuffix(".weight"))
            if facts.served and there is not None:
                module: Any = model.get_submodule(there)
                serve_dense(
                    model, f"{there}.weight", module.weight.detach(), {}, latency, large_batches
                )
        model.load_state_dict(tensors, strict=False, assign=True)
        return prepare(model, latency, None)

    def is_serializable(self) -> bool:
        """Yes: `save_pretrained` writes a packed folder."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: packed weights are fixed."""
        return False


class _Unpack(ConversionOps):
    """The values and the bitmap of one tensor to the tensor."""

    def __init__(self, stored: dict[str, Stored]) -> None:
        self.stored = stored

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """By the shape that the model expects, which the bitmap must fit."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        values, bitmap = (input_dict[f"{part}$"] for part in (VALUES, BITMAP))
        values, bitmap = (t[0] if isinstance(t, list) else t for t in (values, bitmap))
        shape = tuple(model.get_parameter_or_buffer(name).shape)
        dtype = str(values.dtype).removeprefix("torch.")
        return {name: unpack(name, Stored(shape, dtype, values.numel(), False), values, bitmap)}


def _place_of(file: Path, source: str) -> Path:
    """The folder of gossamer.json: that of the weights, or of the Hub's copy of it."""
    if not (file.parent / NAME).exists() and not Path(source).is_dir():
        found = cached_file(source, NAME)
        return Path(found).parent
    return file.parent


def _readable(place: Path, files: dict[str, Any]) -> dict[str, Any]:
    """Those that are there: of a Hub's folder transformers fetches only what it needs."""
    cached = place.parent.name == "snapshots"
    return {name: facts for name, facts in files.items() if not cached or (place / name).exists()}


def _name_in(model: Any, name: str) -> str | None:
    """The layer's name in this model, which may be another's base or hold one as its base."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    names = (name, name.removeprefix(prefix), prefix + name)
    return next((each for each in names if each in modules), None)


def _parts(name: str, known: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one layer as the header of a file describes them, without memory."""
    for key, entry in known.items():
        if key.rpartition(".")[0] == name:
            dtype = _DTYPES.get(entry["dtype"], torch.uint8)
            yield key.rpartition(".")[2], torch.empty(entry["shape"], dtype=dtype, device="meta")


def _saving(usual: Any) -> Any:
    """`save_pretrained` that writes packed models as `gossamer.save` does, others as ever."""

    @wraps(usual)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        packed = any(isinstance(module, Packed) for module in self.modules())
        ours = packed or getattr(self, "quantization_method", None) == METHOD
        if not ours or getattr(self, "_hf_peft_config_loaded", False):  # adapters are saved alone
            return usual(self, save_directory, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            raise UsageError("push_to_hub: save the packed model first, then push its folder")
        if kwargs.get("is_main_process", True):
            _write_into(self, Path(save_directory))
        return None

    return save_pretrained


def _write_into(model: nn.Module, folder: Path) -> None:
    """A packed folder's files among what is in the folder, whose other weights go."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{secrets.token_hex(8)}"
    try:
        save(model, new)
        for kind in ("model*.safetensors*", "pytorch_model*.bin*", f"{PACKED}*.safetensors*"):
            for old in folder.glob(kind):
                old.unlink()
        for file in new.iterdir():
            if file.name != README or not (folder / README).exists():
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
