"""What calibration found: which inputs each layer keeps. Thresholds are data, saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.budget import Threshold
from gossamer.core.errors import FormatError, UsageError
from gossamer.core.files import write_whole
from gossamer.core.result import LayerRecord
from gossamer.engine.inputs.activations.columns import pack_layers
from gossamer.engine.inputs.activations.layer_plan import LayerPlan

FORMAT, VERSION = "gossamer-activations", 1


@dataclass(frozen=True)
class Step:
    """One step of the greedy allocation: the layer that became sparser, and what came of it.

    sparsity: of the layer after the step. error: of the block's output. mean: the block's sparsity.
    """

    layer: str
    sparsity: float
    error: float
    mean: float


@dataclass(frozen=True, eq=False)
class ActivationPlan:
    """Which inputs every layer of one model keeps, as `calibrate_activations` found it.

    Attributes
    ----------
    method : object
        The method, which the file names with its options.
    layers : mapping of str to LayerPlan
        By name.
    left : mapping of str to str
        Linear layers that stay dense, and why.
    path : tuple of Step
        Of the greedy allocation, block after block; empty without one.
    model : str
        A digest of the layers' names, shapes and weights, so that another model is refused.
    loss : tuple of float, optional
        Of the calibration data in nats per token: dense, and with every token's inputs chosen.
    """

    method: Any
    layers: Mapping[str, LayerPlan]
    left: Mapping[str, str]
    path: tuple[Step, ...] = ()
    model: str = ""
    loss: tuple[float, float] | None = None

    @property
    def density(self) -> float:
        """The fraction of the layers' weights that a token is meant to read."""
        sizes = {name: each.shape[0] * each.shape[1] for name, each in self.layers.items()}
        total = sum(sizes.values())
        return sum(self.layers[name].density * size for name, size in sizes.items()) / max(1, total)

    def at(self, density: float) -> dict[str, float]:
        """The densities by layer that the greedy path had where its blocks first reached a mean.

        Parameters
        ----------
        density : float
            At least the plan's own.
        """
        if not self.path:
            return dict.fromkeys(self.layers, density)
        found = dict.fromkeys(self.layers, 1.0)
        reached: set[str] = set()
        for step in self.path:
            block = step.layer.rsplit(".", 2)[0]
            if block not in reached:
                found[step.layer] = 1 - step.sparsity
            if step.mean >= 1 - density - 1e-9:
                reached.add(block)
        return found

    def to_json(self) -> dict[str, Any]:
        """Numbers and names alone; weights that a method derives are derived again at reading."""
        layers = {
            name: {
                "shape": list(each.shape),
                "density": each.density,
                "kept": each.state.density,
                ("threshold" if isinstance(each.budget, Threshold) else "fraction"): (
                    each.budget.value
                    if isinstance(each.budget, Threshold)
                    else each.budget.fraction
                ),
                "zeros": each.zeros,
                "group": each.group,
                "facts": dict(each.state.facts),
            }
            for name, each in self.layers.items()
        }
        path = [[s.layer, s.sparsity, s.error, s.mean] for s in self.path]
        return {
            "format": FORMAT, "version": VERSION, "method": text_of(self.method), "model": self.model,
            "layers": layers, "left": dict(self.left), "path": path,
            "loss": None if self.loss is None else list(self.loss),
        }  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write the thresholds to a JSON file, whole or not at all; returns its path."""
        target = Path(path)
        text = json.dumps(self.to_json(), indent=1) + "\n"
        write_whole(target, lambda place: place.write_text(text))
        return target

    def pack(
        self, root: nn.Module, wanted: Collection[str], bits: int | None, timed: bool
    ) -> list[LayerRecord]:
        """Put an `ActiveLinear` in the place of each layer; what `compress` calls.

        wanted: names of layers that may be packed. bits: 8 or None. timed: leave layers dense where
        that is faster. Raises UsageError, before anything changes, for a plan of another model.
        """
        modules = dict(root.named_modules())
        found = ((name, modules.get(name)) for name in self.layers)
        layers = {name: each for name, each in found if isinstance(each, nn.Linear)}
        self.check_model({name: each.weight for name, each in layers.items()})
        chosen = [name for name in layers if name in wanted]
        del modules, found, layers  # so that each weight is freed as soon as it is packed
        return pack_layers(root, self.layers, chosen, text_of(self.method), bits, timed)

    def check_model(self, weights: Mapping[str, Tensor]) -> None:
        """Raise UsageError unless the plan is of a model with these weights."""
        for name, each in self.layers.items():
            if name not in weights or tuple(weights[name].shape) != each.shape:
                found = tuple(weights[name].shape) if name in weights else "no such layer"
                raise UsageError(_another(f"layer {name} is {each.shape}, here {found}"))
        if digest_weights({name: weights[name] for name in self.layers}) != self.model:
            raise UsageError(_another("its weights differ"))


def text_of(method: Any) -> str:
    """A method as the command line has it, `name:option=value,...`."""
    options = (f"{each.name}={getattr(method, each.name)}" for each in fields(method))
    return f"{method.card.name}:{','.join(options)}"


def _another(why: str) -> str:
    return (
        f"these thresholds are of another model: {why}; calibrate this one with "
        "gs.calibrate_activations"
    )


def digest_weights(weights: Mapping[str, Tensor]) -> str:
    """Of names, shapes and a few hundred numbers of each matrix, as bfloat16 holds them."""
    total = blake2b(digest_size=16)
    for name, weight in sorted(weights.items()):
        total.update(f"{name}|{tuple(weight.shape)}\n".encode())
        step = max(1, weight.shape[0] // 8)
        some = weight.detach()[::step, :64].to(torch.bfloat16).contiguous().cpu()
        total.update(some.view(torch.int16).numpy().tobytes())
    return total.hexdigest()


def read_plan(path: str | Path) -> dict[str, Any]:
    """The checked content of a file of thresholds; raises FormatError for anything else."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: no file of thresholds ({error})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{path}: no file of thresholds; gs.calibrate_activations makes one")
    if data.get("version") != VERSION:
        raise FormatError(f"{path}: version {data.get('version')!r} is not {VERSION}")
    wanted = {"format", "version", "method", "model", "layers", "left", "path", "loss"}
    if set(data) != wanted:
        raise FormatError(f"{path}: keys differ: {sorted(set(data) ^ wanted)}")
    for name, each in data["layers"].items():
        one = {"threshold"} & set(each) or {"fraction"}
        if set(each) != {"shape", "density", "kept", "zeros", "group", "facts"} | one:
            raise FormatError(f"{path}: layer {name} has other keys: {sorted(each)}")
    return data


@dataclass(frozen=True, eq=False)
class Chosen:
    """Linear layers of a model by name, why others are left out, and the block of each."""

    layers: dict[str, nn.Linear]
    left: dict[str, str]
    blocks: dict[str, int | None] = field(default_factory=dict)
