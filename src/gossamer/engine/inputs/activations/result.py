"""What happened while inputs were chosen: counted in the layers, told at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gossamer.core.errors import UsageError
from gossamer.engine.inputs.activations.plan import ActivationPlan
from gossamer.nn.active import ActiveProduct


@dataclass(frozen=True)
class LayerActivations:
    """The figures of one layer.

    Attributes
    ----------
    name : str
        Of the module, dotted.
    asked : float
        The fraction of inputs it was meant to keep; 1.0 where it stays dense.
    density : float or None
        The fraction of inputs that tokens kept. None where no call masked.
    union : float or None
        The fraction of inputs that some token of a call kept, averaged over calls that masked.
    served : str
        `columns` behind the skipping kernel, `masked` where nothing is skipped, or why it stays
        dense.
    ways : mapping of str to int
        How calls ran: `one token`, `few tokens`, `masked dense`, `dense`.
    zeros : float or None
        The fraction of inputs that were exactly zero in calibration.
    """

    name: str
    asked: float
    density: float | None
    union: float | None
    served: str
    ways: Mapping[str, int]
    zeros: float | None = None


@dataclass(frozen=True, repr=False)
class ActivationResult:
    """What choosing inputs did: where it ran, what was kept, and what a token reads.

    Attributes
    ----------
    method : str
        With its options.
    layers : tuple of LayerActivations
        Every layer that the plan names.
    density, union : float or None
        Over all layers by their weights; None where no call masked.
    ways : mapping of str to int
        How layers' calls ran.
    dense_bytes, bytes : int
        Of the layers' weights that one token reads: all, and the kept with what the method adds.
    added_bytes : int
        What the method itself reads for one token: norms, rotations, low-rank parts.
    held_bytes : int
        What is held in memory beside the model's own weights.
    loss : tuple of float, optional
        Nats per token on the calibration data: dense, and with the inputs of every token chosen.
    """

    method: str
    layers: tuple[LayerActivations, ...]
    density: float | None
    union: float | None
    ways: Mapping[str, int]
    dense_bytes: int
    bytes: int
    added_bytes: int
    held_bytes: int
    loss: tuple[float, float] | None = None

    def check_reached(self) -> None:
        """Raise UsageError where no layer was called at all."""
        if not self.ways:
            raise UsageError(
                f"none of {len(self.layers)} layers was called in the block of "
                "gs.sparsify_activations; run the model inside it"
            )

    def __str__(self) -> str:
        """A few lines for people."""
        sparse = sum(layer.asked < 1 for layer in self.layers)
        ways = ", ".join(f"{count} {way}" for way, count in self.ways.items()) or "none"
        lines = [
            f"{self.method}: {sparse} of {len(self.layers)} layers choose inputs",
            f"calls of layers: {ways}",
        ]
        if self.density is not None:
            lines.append(f"density {self.density:.3f} of weights, union {self.union:.3f}")
            share = self.bytes / max(1, self.dense_bytes)
            lines.append(
                f"a token reads {self.bytes:,} bytes of {self.dense_bytes:,} ({share:.3f}), "
                f"{self.added_bytes:,} of them by the method itself"
            )
        if self.loss is not None:
            lines.append(f"loss {self.loss[0]:.4f} dense, {self.loss[1]:.4f} chosen, nats a token")
        return "\n".join(lines + self._warnings())

    __repr__ = __str__

    def _warnings(self) -> list[str]:
        """What a reader should not miss."""
        lines = []
        zeros = [x.zeros for x in self.layers if x.zeros is not None]
        if zeros and max(zeros) < 0.01:
            lines.append(
                "no layer has inputs that are zero by themselves: what is skipped is small, not "
                "zero, so quality is the price"
            )
        if self.loss is not None and self.loss[1] - self.loss[0] > 0.1:
            lines.append(
                f"the loss grows by {self.loss[1] - self.loss[0]:.2f} nats a token: this model is "
                "not sparse enough for this density"
            )
        return lines


@dataclass(frozen=True)
class Served:
    """A layer's product, and `columns` or `masked`; or none, and why it stays dense."""

    product: ActiveProduct | None
    why: str
    itemsize: int


def told(
    plan: ActivationPlan, served: Mapping[str, Served], held: int, loss: tuple[float, float] | None
) -> ActivationResult:
    """The figures so far."""
    layers, ways = [], Counter[str]()
    dense = kept = added = 0
    seen = False
    for name, each in plan.layers.items():
        part = served[name]
        record = _layer(name, each.shape[1], part, plan)
        layers.append(record)
        ways.update(record.ways)
        size = each.shape[0] * each.shape[1]
        dense += size * part.itemsize
        own = _added(part.product)
        share = 1.0 if part.product is None else record.density
        kept += round(size * part.itemsize * (1.0 if share is None else share)) + own
        added += own
        seen = seen or record.density is not None
    rotations = _rotations([part.product for part in served.values()])
    return ActivationResult(
        repr(plan.method), tuple(layers),
        _overall([x.density for x in layers], plan) if seen else None,
        _overall([x.union for x in layers], plan) if seen else None,
        dict(ways), dense, kept + rotations, added + rotations, held, loss,
    )  # fmt: skip


def _overall(shares: Sequence[float | None], plan: ActivationPlan) -> float:
    """Weights read over all weights; None, where no call masked, stands for all."""
    sizes = [each.shape[0] * each.shape[1] for each in plan.layers.values()]
    read = sum(
        size * (1.0 if share is None else share) for size, share in zip(sizes, shares, strict=True)
    )
    return read / sum(sizes)


def _layer(name: str, width: int, part: Served, plan: ActivationPlan) -> LayerActivations:
    zeros = plan.layers[name].zeros
    if part.product is None:
        return LayerActivations(name, 1.0, None, None, part.why, {}, zeros)
    counts = part.product.counts
    density = counts.kept / (counts.tokens * width) if counts.tokens else None
    union = counts.union / (counts.calls * width) if counts.calls else None
    asked = plan.layers[name].state.density
    return LayerActivations(name, asked, density, union, part.why, dict(counts.ways), zeros)


def _added(product: ActiveProduct | None) -> int:
    """Bytes that one token reads beside the kept weights, rotations apart."""
    if product is None:
        return 0
    scale = 0 if product.state.scale is None else product.state.scale.nbytes
    return scale + sum(part.nbytes for part in product.state.bypass or ())


def _rotations(products: Sequence[ActiveProduct | None]) -> int:
    """Bytes of rotations, each once for the layers that share it."""
    found = {
        id(x.rotation): x.rotation.matrix.nbytes
        for x in products
        if x is not None and x.rotation is not None
    }
    return sum(found.values())
