"""Reading a folder back: packed layers take their places in the model its config describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.costs import Costs
from gossamer.core.errors import FormatError, MissingExtra, UsageError
from gossamer.core.matrix import as_matrix, is_prunable
from gossamer.io.manifest import NAME, PackedLayer, _one_line, read_json, read_manifest
from gossamer.io.tensors import read_tensors
from gossamer.nn import (
    BitmapLinear,
    NMLinear,
    PackedConv2d,
    QuantizedLinear,
    serves_batches,
)
from gossamer.nn.chain import fuse
from gossamer.nn.conv import no_kernel
from gossamer.nn.costs import known_costs, use_costs
from gossamer.nn.dispatch import choose_forms, prepare_where_it_pays
from gossamer.ops.quantized import QuantizedMatrix


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    batches: bool | None = None,
    costs: Costs | Literal["rule"] | None = None,
) -> nn.Module:
    """The model of a folder that `save` wrote, in eval mode, packed layers behind their kernels.

    A Hugging Face folder rebuilds itself from its config, by the class that transformers has under
    the config's name (never code from the folder); one without gossamer.json loads as an ordinary
    dense model. Any other module must be passed as `model`, an instance of the same structure,
    which is filled in place once everything has been checked. dtype: convert floating tensors.
    batches: also build the form that serves many rows of input at once, as `compress` does: in
    the layers where it is predicted to be the fastest. Each packed layer's `batches_decided` says
    what was predicted. None: unless the model generates text.
    costs: what the prediction goes by, as in `compress`. None: what `calibrate_costs` measured on
    this machine, where it did. "rule", and else: every layer gets the form.

    Raises FormatError for anything wrong with the files, UsageError where `model` is missing.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UsageError(f"{place} is not a folder; give one that gossamer or transformers wrote")
    packed: dict[str, PackedLayer] = {}
    if (place / NAME).exists() or (place / NAME).is_symlink():
        packed = read_manifest(place)["layers"]
    tensors = read_tensors(place)
    layers = {name: _layer(name, facts, tensors) for name, facts in packed.items()}
    root = _build(place, len(tensors) + len(layers)) if model is None else model
    try:
        _place(root, layers, tensors, {name: facts.kernel for name, facts in packed.items()})
    except FormatError:
        if layers or model is not None or (place / NAME).exists():
            raise
        root = _ordinary(place, type(root))
    if dtype is not None:
        _convert(root, dtype)
    fuse(root)
    measured = known_costs(costs)
    use_costs(root, measured)
    batches = serves_batches(root, batches)
    choose_forms(root, measured, batches)
    if batches:
        prepare_where_it_pays(root, measured)
    return root.eval()


Packed = BitmapLinear | NMLinear | QuantizedLinear


def _layer(name: str, facts: PackedLayer, tensors: dict[str, Tensor]) -> Packed:
    """Takes the layer's tensors out of `tensors`; raises FormatError on any contradiction."""
    if facts.group is not None:
        return _quantized_layer(name, facts, tensors)
    index = "codes" if facts.nm else "bitmap"
    try:
        values, places = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.{index}")
        bias = tensors.pop(f"{name}.bias") if facts.bias else None
    except KeyError as error:
        raise FormatError(f"layer {name}: tensor {error} is missing") from None
    out, width = facts.shape
    fits = values.dim() == (2 if facts.nm else 1) and str(values.dtype)[6:] == facts.dtype
    # not every dtype that a file may claim can be counted
    if not fits or facts.nnz != (int(values.count_nonzero()) if facts.nm else values.numel()):
        raise FormatError(f"layer {name}: its values are not {facts.nnz} of {facts.dtype}")
    _check_bias(name, bias, out)
    try:
        kind = NMLinear if facts.nm else BitmapLinear
        return kind(values, places, width, out, bias, facts.pattern, facts.requested)
    except (FormatError, UsageError) as error:
        raise FormatError(f"layer {name}: {_one_line(error)}") from None


def _check_bias(name: str, bias: Tensor | None, out: int) -> None:
    if bias is not None and (bias.shape != (out,) or not bias.is_floating_point()):
        raise FormatError(f"layer {name}: its bias does not have {out} numbers")


def _quantized_layer(name: str, facts: PackedLayer, tensors: dict[str, Tensor]) -> QuantizedLinear:
    def take(part: str, present: bool = True) -> Tensor | None:
        return tensors.pop(f"{name}.{part}") if present else None

    try:
        values, scales = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.scales")
        bitmap, zeros = take("bitmap", facts.sparse), take("zeros", facts.zeros)
        bias = take("bias", facts.bias)
        outliers = None
        if facts.outliers:
            parts = [tensors.pop(f"{name}.outlier_{part}") for part in ("ptr", "cols", "values")]
            outliers = (parts[0], parts[1], parts[2])
    except KeyError as error:
        raise FormatError(f"layer {name}: tensor {error} is missing") from None
    _check_bias(name, bias, facts.shape[0])
    try:
        bits, group = int(facts.dtype.removeprefix("int")), facts.group or 0
        matrix = QuantizedMatrix.of(
            values, bitmap, scales, zeros, outliers, facts.shape, bits, group
        )
    except (FormatError, UsageError) as error:
        raise FormatError(f"layer {name}: {_one_line(error)}") from None
    layer = QuantizedLinear(matrix, bias, facts.pattern, facts.requested)
    found = 0 if outliers is None else outliers[1].numel()
    if layer.kept != facts.nnz or found != facts.outliers:
        raise FormatError(f"layer {name}: it keeps {layer.kept} weights, not {facts.nnz}")
    return layer


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
    return root


def _build(folder: Path, tensors: int | None = None) -> nn.Module:
    """The model of config.json without memory for weights; `tensors` bounds its depth."""
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{folder} holds no config.json, so its structure is unknown: pass model=, an instance "
            "to fill"
        )
    config_json = read_json(folder, "config.json")
    for key, value in config_json.items():
        if key == "num_labels" and not (isinstance(value, int) and 0 <= value <= 1 << 20):
            raise FormatError("config.json: num_labels is not a whole number up to 1048576")
        deep = isinstance(value, int) and tensors is not None and value > tensors
        if deep and key in ("n_layer", "num_layers", "num_hidden_layers"):
            raise FormatError(f"config.json: {key} is {value}, more than the tensors in the files")
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    names = config_json.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind: Any = None
    if isinstance(name, str) and name.isidentifier():
        kind = getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise FormatError("config.json: architectures names no model that transformers has")
    try:
        config = kind.config_class.from_dict(
            {k: v for k, v in config_json.items() if k != "auto_map"}
        )
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # whatever a hostile config provokes inside transformers
        raise FormatError(f"config.json: {type(error).__name__}: {_one_line(error)}") from None


def _place(
    root: nn.Module,
    layers: Mapping[str, Packed],
    tensors: dict[str, Tensor],
    kernels: Mapping[str, tuple[int, int] | None],
) -> None:
    """Check everything, then change `root`."""
    modules = dict(root.named_modules())
    for name, layer in layers.items():
        module = modules.get(name)
        fits = module is not None and is_prunable(module)
        fits = fits and not isinstance(module, nn.Embedding)
        if isinstance(module, nn.Conv2d):
            fits = fits and isinstance(layer, BitmapLinear) and not no_kernel(module)
            fits = fits and module.kernel_size == (kernels[name] or (1, 1))
        else:
            fits = fits and kernels[name] is None
        shape = (layer.out_features, layer.in_features)
        if not fits or as_matrix(module).shape != shape:  # type: ignore[arg-type]
            raise FormatError(f"layer {name}: the model has no linear layer of that shape there")
    wanted = _wanted(root, layers)
    for name in wanted.keys() | tensors.keys():
        if name not in wanted:
            raise FormatError(f"tensor {name}: not part of the model")
        if name in tensors and tensors[name].shape != wanted[name].shape:
            raise FormatError(
                f"tensor {name}: {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
            )
        if (
            name in tensors
            and tensors[name].is_floating_point() != wanted[name].is_floating_point()
        ):
            raise FormatError(f"tensor {name}: {tensors[name].dtype}, not {wanted[name].dtype}")
    missing = _missing(root, wanted, tensors)
    if missing:
        raise FormatError(f"tensor {missing[0]}: missing from the files")
    for name, layer in layers.items():
        conv = modules[name]
        if isinstance(conv, nn.Conv2d) and isinstance(layer, BitmapLinear):
            root.set_submodule(name, PackedConv2d.from_conv(conv, layer))
        else:
            root.set_submodule(name, layer)
    on_meta = any(t.is_meta for t in root.state_dict().values())
    root.load_state_dict(tensors, strict=False, assign=on_meta)
    tie: Any = getattr(root, "tie_weights", None)
    if tie is not None:
        tie()
    _restore_buffers(root)


def _wanted(root: nn.Module, layers: Mapping[str, Packed]) -> dict[str, Tensor]:
    inside = tuple(f"{name}." for name in layers)
    state = root.state_dict()
    return {k: v for k, v in state.items() if not (inside and k.startswith(inside))}


def _missing(
    root: nn.Module, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Names without a tensor, other than those tied to one that is there."""
    parameters = dict(root.named_parameters(remove_duplicate=False))
    present = {id(parameters[name]) for name in tensors if name in parameters}
    tied = getattr(root, "all_tied_weights_keys", None) or {}
    tied = tied if isinstance(tied, dict) else {}
    return [
        name
        for name in wanted
        if name not in tensors
        and not (name in parameters and id(parameters[name]) in present)
        and tied.get(name) not in tensors
    ]


def _convert(root: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of what is stored; computed buffers (rotary frequencies) keep theirs."""
    for module in root.modules():
        skipped = module._non_persistent_buffers_set
        if isinstance(module, QuantizedLinear):
            skipped = skipped | module._buffers.keys()
        for parts in (module._parameters, module._buffers):
            for name, tensor in parts.items():
                if tensor is None or name in skipped or not tensor.is_floating_point():
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.to(dtype)
                else:
                    module._buffers[name] = tensor.to(dtype)


def _restore_buffers(root: nn.Module) -> None:
    """Buffers that are never stored (rotary frequencies) are computed anew off the meta device."""
    configs: dict[str, Any] = {}
    for path, module in list(root.named_modules()):
        above = configs.get(path.rpartition(".")[0])
        configs[path] = config = getattr(module, "config", None) or above
        if not any(b.is_meta for b in module.buffers(recurse=False)):
            continue
        try:
            fresh = type(module)(config)
        except Exception as error:
            raise FormatError(
                f"{type(module).__name__}: its buffers cannot be rebuilt ({_one_line(error)})"
            ) from None
        for name, buffer in fresh.named_buffers(recurse=False):
            module._buffers[name] = buffer
        for name, value in vars(fresh).items():
            if isinstance(value, Tensor):
                setattr(module, name, value)
