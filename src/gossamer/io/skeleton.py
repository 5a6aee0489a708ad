"""The model that a config.json describes, before any weight is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gossamer.core.errors import FormatError, MissingExtra, UsageError
from gossamer.io.manifest import _one_line, read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
LARGEST_BUFFERS = 4 << 30
"""Bytes of computed buffers that a config may ask for; no file backs them."""
_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
_DTYPES = {"float32", "bfloat16", "float16", "float64"}
_LAYERS = ("n_layer", "num_layers", "num_hidden_layers")


def read_config(folder: Path, tensors: int | None = None) -> dict[str, Any]:
    """config.json, checked for sizes that nothing in the files backs; `tensors` bounds its depth.

    Raises UsageError where there is none.
    """
    if not (folder / CONFIG).exists() and not (folder / CONFIG).is_symlink():
        raise UsageError(
            f"{folder} holds no config.json, so its structure is unknown: pass model=, an instance "
            "to fill"
        )
    config = read_json(folder, CONFIG)
    for key, value in config.items():
        if key == "num_labels" and not (isinstance(value, int) and 0 <= value <= 1 << 20):
            raise FormatError("config.json: num_labels is not a whole number up to 1048576")
        deep = isinstance(value, int) and tensors is not None and value > tensors
        if deep and key in _LAYERS:
            raise FormatError(f"config.json: {key} is {value}, more than the tensors in the files")
    return config


def class_of(config: Mapping[str, Any]) -> Any:
    """The class of transformers, or of diffusers, that a config names; never the folder's code."""
    library, name, base = "transformers", None, "PreTrainedModel"
    names = config.get("architectures")
    if isinstance(names, list) and names:
        name = names[0]
    elif "_class_name" in config:
        library, name, base = "diffusers", config["_class_name"], "ModelMixin"
    try:
        package = import_module(library)
    except ImportError:
        raise MissingExtra(library, "hf") from None
    known = isinstance(name, str) and name.isidentifier()
    kind = getattr(package, str(name), None) if known else None
    if not (isinstance(kind, type) and issubclass(kind, getattr(package, base))):
        key = "architectures" if library == "transformers" else "_class_name"
        raise FormatError(f"config.json: {key} names no model that {library} has")
    return kind


def outline(config: Mapping[str, Any]) -> nn.Module:
    """The model without memory for any tensor: names and shapes alone, on the meta device."""
    return _build(config, outline=True)


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The model with its parameters on the meta device and every buffer real.

    Buffers that no file holds (rotary frequencies, sinusoidal positions, scales of embeddings) are
    then what the class computes, whatever the arguments of its parts.
    """
    return _build(config, outline=False)


def _build(config: Mapping[str, Any], outline: bool) -> nn.Module:
    kind = class_of(config)
    facts = {k: _decoded(v) for k, v in config.items() if k not in _NOT_STRUCTURE}
    name = facts.get("dtype", facts.get("torch_dtype"))
    dtype = getattr(torch, name) if isinstance(name, str) and name in _DTYPES else torch.float32
    try:
        built = _made(kind, facts, dtype, torch.device("meta") if outline else parameters_on_meta())
    except Exception as error:  # whatever a hostile config provokes inside the library
        raise FormatError(f"config.json: {type(error).__name__}: {_one_line(error)}") from None
    assert isinstance(built, nn.Module)
    return built


def _made(kind: Any, facts: dict[str, Any], dtype: torch.dtype, place: Any) -> Any:
    """An instance; its class first draws the numbers that buffers get, where it is able to."""
    if not hasattr(kind, "_from_config"):  # of diffusers
        with place:
            return kind.from_config(facts)
    try:
        with place:
            return kind._from_config(kind.config_class.from_dict(facts), dtype=dtype)
    except AttributeError:
        # transformers builds some types on the meta device alone, where it never draws
        if isinstance(place, torch.device):
            raise
        quiet = import_module("transformers.initialization").no_init_weights
        with parameters_on_meta(), quiet():
            return kind._from_config(kind.config_class.from_dict(facts), dtype=dtype)


_NOT_STRUCTURE = ("auto_map", "quantization_config", "transformers_weights")


def _decoded(value: Any) -> Any:
    """JSON has no infinity: transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        tag = value.get("__float__")
        if len(value) == 1 and isinstance(tag, str) and tag in _FLOATS:
            return _FLOATS[tag]
        return {key: _decoded(each) for key, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


_LOCK = threading.RLock()
_LARGE = 1 << 24
"""Numbers from which `torch.empty` is taken for a parameter's, which needs no memory."""


_FILLS = frozenset({
    "normal_", "uniform_", "trunc_normal_", "zero_", "fill_", "constant_", "ones_", "zeros_",
    "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
})  # fmt: skip


class _Unfilled(TorchFunctionMode):
    """Large empty tensors get no memory, which a system might refuse, and meta ones no numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS and args and getattr(args[0], "is_meta", False):
            return args[0]
        if func is torch.empty and kwargs.get("device") is None:
            drawn = func(*args, **{**kwargs, "device": "meta"})
            if drawn.numel() >= _LARGE:
                return drawn
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds inside keep buffers and lose the memory of parameters."""
    with _LOCK, _Unfilled():
        register, thread = nn.Module.register_parameter, threading.get_ident()

        def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(module, name, param)
            if param is not None and not param.is_meta and threading.get_ident() == thread:
                empty = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
                vars(empty).update(vars(param))
                torch.utils.swap_tensors(param, empty)  # the same object, as others may hold it
                vars(param)["_is_hf_initialized"] = True  # or transformers draws numbers for it

        nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_generation(folder: Path, model: nn.Module) -> None:
    """Give a model that generates the settings that were written beside it."""
    there = (folder / GENERATION).exists() or (folder / GENERATION).is_symlink()
    if not there or not hasattr(model, "generation_config"):
        return
    facts = _decoded(read_json(folder, GENERATION))
    try:
        model.generation_config = import_module("transformers").GenerationConfig.from_dict(facts)
    except Exception as error:  # whatever a hostile file provokes inside transformers
        raise FormatError(f"{GENERATION}: {type(error).__name__}: {_one_line(error)}") from None


def computed_bytes(model: nn.Module) -> int:
    """Bytes of the buffers that no file holds."""
    kept = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    buffers = dict(model.named_buffers())
    return sum(buffers[name].numel() * buffers[name].element_size() for name in kept)
