"""Feed-forward networks that compute only the neurons that the prompt chose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.errors import UsageError
from gossamer.core.matrix import why_not_plain
from gossamer.engine.hooks import substitute
from gossamer.engine.inputs.activations.protocols import NeuronSelector
from gossamer.engine.inputs.activations.result import ActivationResult, LayerActivations
from gossamer.models.widths import CoupledWidth, find_widths

PROMPT, SLICED, MASKED = "prompt", "sliced", "masked"
"""Ways in which a network is called: read densely, with slices of its weights, with masks."""


@dataclass(eq=False)
class Network:
    """One feed-forward network: layers that write its neurons, and the one that reads them.

    chosen: int64 indices for each text of the last prompt. slices: the weights of the neurons of
    one text, by the layer's name.
    """

    name: str
    writers: Mapping[str, nn.Linear]
    reader: tuple[str, nn.Linear]
    method: NeuronSelector
    chosen: list[Tensor] = field(default_factory=list)
    slices: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)
    paused: bool = False

    @property
    def units(self) -> int:
        """How many neurons there are."""
        return self.reader[1].in_features

    def write(self, name: str) -> Callable[[Tensor], Tensor]:
        """The forward of a layer that writes neurons."""
        layer = self.writers[name]

        def forward(x: Tensor) -> Tensor:
            if self._sliced(x):
                return functional.linear(x, *self.slices[name])
            return functional.linear(x, layer.weight, layer.bias)

        return forward

    def read(self, x: Tensor) -> Tensor:
        """The forward of the layer that reads them; a prompt makes the choice here."""
        name, layer = self.reader
        if x.dim() != 3:
            raise UsageError(
                f"{name} is called with {tuple(x.shape)}, not (texts, tokens, neurons)"
            )
        if self.paused:
            return functional.linear(x, layer.weight, layer.bias)
        if x.shape[1] > 1:
            self._count(PROMPT)
            with torch.no_grad():
                self._choose(x)
            return functional.linear(x, layer.weight, layer.bias)
        if self._sliced(x):
            self._count(SLICED)
            return functional.linear(x, *self.slices[name])
        if not self.chosen:
            raise UsageError(
                f"{name}: no prompt of two tokens or more came before the first single token"
            )
        self._count(MASKED)
        return functional.linear(x * self._mask(x), layer.weight, layer.bias)

    def _choose(self, x: Tensor) -> None:
        self.chosen = [self.method.neurons(text) for text in x]
        self.slices = {}
        if len(self.chosen) != 1:
            return
        index, (name, layer) = self.chosen[0], self.reader
        for each, writer in self.writers.items():
            bias = None if writer.bias is None else writer.bias[index]
            self.slices[each] = (writer.weight[index], bias)
        self.slices[name] = (layer.weight[:, index], layer.bias)

    def _sliced(self, x: Tensor) -> bool:
        return not self.paused and bool(self.slices) and x.shape[:2] == (1, 1)

    def _mask(self, x: Tensor) -> Tensor:
        if len(self.chosen) != len(x):
            raise UsageError(
                f"{self.name}: {len(x)} texts are decoded where the prompt held {len(self.chosen)}"
            )
        mask = torch.zeros_like(x)
        for row, index in zip(mask, self.chosen, strict=True):
            row[..., index] = 1
        return mask

    def _count(self, way: str) -> None:
        self.ways[way] = self.ways.get(way, 0) + 1


class NeuronRun:
    """What a block of `sparsify_activations` yields for methods that choose neurons.

    Attributes
    ----------
    networks : tuple of Network
        The feed-forward networks, with the neurons that the last prompt chose.
    """

    def __init__(self, method: NeuronSelector, networks: Sequence[Network]) -> None:
        self._method, self.networks = method, tuple(networks)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """While open, everything is computed, and nothing is chosen."""
        for network in self.networks:
            network.paused = True
        try:
            yield
        finally:
            for network in self.networks:
                network.paused = False

    @property
    def result(self) -> ActivationResult:
        """The figures so far; `union` is over the texts of the last prompt."""
        layers: list[LayerActivations] = []
        ways: dict[str, int] = {}
        total = read = united = held = 0
        for network in self.networks:
            kept = [len(index) for index in network.chosen]
            density = sum(kept) / len(kept) / network.units if kept else None
            union = len(torch.cat(network.chosen).unique()) / network.units if kept else None
            for name, layer in (*network.writers.items(), network.reader):
                size = layer.weight.nbytes
                served = "neurons of the prompt"
                asked, ways_here = self._method.density, dict(network.ways)
                layers.append(LayerActivations(name, asked, density, union, served, ways_here))
                total += size
                read += round(size * (1.0 if density is None else density))
                united += round(size * (1.0 if union is None else union))
            for way, count in network.ways.items():
                ways[way] = ways.get(way, 0) + count
            held += sum(weight.nbytes for weight, _ in network.slices.values())
        seen = any(network.chosen for network in self.networks)
        return ActivationResult(
            repr(self._method), tuple(layers), read / total if seen else None,
            united / total if seen else None, ways, total, read, 0, held,
        )  # fmt: skip


@contextmanager
def select_neurons(model: nn.Module, method: NeuronSelector) -> Iterator[NeuronRun]:
    """Networks whose neurons each prompt chooses, for as long as the block is open."""
    networks = find_networks(model, method)
    forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
    for network in networks:
        forwards += [(layer, network.write(name)) for name, layer in network.writers.items()]
        forwards.append((network.reader[1], network.read))
    run = NeuronRun(method, networks)
    with substitute(forwards):
        yield run
    run.result.check_reached()


def find_networks(model: nn.Module, method: NeuronSelector) -> list[Network]:
    """The feed-forward networks that a method serves; raises UsageError where there is none."""
    widths = find_widths(model, "neurons")
    found = [_network(model, width, method) for width in widths]
    networks = [each for place, each in enumerate(found) if method.serves(place, len(found))]
    if not networks:
        raise UsageError(
            f"{type(model).__name__} has no feed-forward network of linear layers, such as "
            f"gate_proj, up_proj and down_proj, that {method.card.name} could serve"
        )
    return networks


def _network(model: nn.Module, width: CoupledWidth, method: NeuronSelector) -> Network:
    layers = {slot.layer: model.get_submodule(slot.layer) for slot in width.slots}
    for name, layer in layers.items():
        reason = why_not_plain(layer) if isinstance(layer, nn.Linear) else type(layer).__name__
        if reason is not None:
            raise UsageError(f"{name} is no plain linear layer ({reason})")
    if any(slot.index.shape[1] != 1 for slot in width.slots):
        raise UsageError(f"{width.name}: its gate and up weights lie in one matrix")
    *writers, reader = width.slots
    linear = {n: layer for n, layer in layers.items() if isinstance(layer, nn.Linear)}
    return Network(
        width.name, {slot.layer: linear[slot.layer] for slot in writers},
        (reader.layer, linear[reader.layer]), method,
    )  # fmt: skip
