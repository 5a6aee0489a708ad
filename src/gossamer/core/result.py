"""Frozen results: what was asked, what was measured, and which code serves each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.support import Support


@dataclass(frozen=True)
class LayerRecord:
    """What was asked for in one layer, what came out, and what serves it.

    Attributes
    ----------
    name : str
        Of the layer, dotted.
    shape : tuple of int
        (out, in) of the weight as a matrix.
    density, requested_density : float
        The measured and the requested fraction kept. Of integers, density is that after rounding.
    kernel : str or None
        What serves batch sizes up to 8, or images. Behind a `+` stands what a form prepared for
        larger ones is. None where the layer stays dense.
    reason : str or None
        Why it stays dense.
    pattern : str
        As `format_pattern` writes it.
    dense_bytes, sparse_bytes : int
        Of the weight alone.
    batch_kernel : str
        What serves larger batch sizes, prepared or not. Empty where dense.
    decided : str
        What chose: the measured latencies, with what they predict, or a rule.
    predicted : mapping of str to float
        Seconds by kernel, `dense` among them, where latencies were measured.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    requested_density: float
    kernel: str | None = None
    reason: str | None = None
    pattern: str = ""
    dense_bytes: int = 0
    sparse_bytes: int = 0
    batch_kernel: str = ""
    decided: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """Weights that stayed as they were, and why.

    Attributes
    ----------
    name : str
        Of the parameter, dotted.
    kind : str
        Of the module that holds it.
    count : int
        How many weights.
    reason : str
        Why, in one line.
    """

    name: str
    kind: str
    count: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """How much of a whole model was reached, in weights; shared ones count once.

    Attributes
    ----------
    total : int
        Every parameter.
    matrices : int
        Those with two dimensions or more, embeddings included.
    prunable : int
        Matrices that Gossamer can prune.
    pruned : int
        Those that this call chose.
    nonzero : int
        Weights of the whole model that are not zero.
    packed : int
        Those behind a sparse kernel.
    left_out : tuple of LeftOut
        Every matrix that was not pruned. After `compress`, those that hold zeros and are not
        packed.
    """

    total: int = 0
    matrices: int = 0
    prunable: int = 0
    pruned: int = 0
    nonzero: int = 0
    packed: int = 0
    left_out: tuple[LeftOut, ...] = ()

    @property
    def density(self) -> float:
        """The fraction of all of the model's parameters that is not zero."""
        return self.nonzero / self.total if self.total else 1.0

    @property
    def pruned_share(self) -> float:
        """The fraction of the model's matrix weights that this call chose."""
        return self.pruned / self.matrices if self.matrices else 0.0


@dataclass(frozen=True, repr=False)
class PruneResult:
    """What `prune` did: the model, its supports, and the requested and measured figures.

    Attributes
    ----------
    model : nn.Module
        The model that was given, pruned.
    supports : mapping of str to Support
        The kept positions by the name of the layer. A support has a density of its own.
    layers : tuple of LayerRecord
        One record for each pruned layer.
    method, pattern : str
        What was asked for, in words.
    requested_density : float
        What was asked for.
    measured_density : float
        The share of the pruned layers' weights that are not zero after the call.
    provenance : mapping
        What a saved file says of how the zeros came about.
    coverage : Coverage
        Of the whole model.
    notes : tuple of str
        What else a reader should know, such as where a mask could not be applied.
    figures : mapping of str to mapping
        By layer, what the method reports of its work, such as how many weights it swapped.
    """

    model: nn.Module
    supports: Mapping[str, Support]
    layers: tuple[LayerRecord, ...]
    method: str
    pattern: str
    requested_density: float
    measured_density: float
    provenance: Mapping[str, Any] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        """A few lines: what was done, how much of the model it reached, and what was left out."""
        lines = [f"{what}: {value}" for what, value in self._facts()]
        return "\n".join([f"{type(self.model).__name__} pruned", *lines, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same as a small table, for notebooks."""
        rows = [*self._facts(), *(("note", note) for note in self.notes)]
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(what)}</th>"
            f"<td style='text-align:left'>{escape(value)}</td></tr>"
            for what, value in rows
        )
        title = escape(type(self.model).__name__)
        return f"<table><caption>{title} pruned</caption>{cells}</table>"

    def _facts(self) -> list[tuple[str, str]]:
        cover = self.coverage
        facts = [
            ("method", f"{self.method}, {self.pattern}"),
            (
                "density",
                f"{self.measured_density:.4f} of {len(self.layers)} pruned matrices, "
                f"{cover.density:.4f} of the whole model",
            ),
            ("pruned", f"{cover.pruned_share:.1%} of {cover.matrices:,} matrix weights"),
        ]
        return facts + [("left dense", line) for line in _reasons(cover.left_out)[:4]]


def _reasons(left_out: Iterable[LeftOut]) -> list[str]:
    """What was left out, by reason, the most weights first."""
    groups: dict[str, list[LeftOut]] = {}
    for each in left_out:
        groups.setdefault(each.reason, []).append(each)
    sizes = {reason: sum(x.count for x in group) for reason, group in groups.items()}
    lines = []
    for reason in sorted(groups, key=lambda reason: -sizes[reason]):
        kinds = ", ".join(dict.fromkeys(x.kind for x in groups[reason]))
        first = groups[reason][0].name
        more = f" and {len(groups[reason]) - 1} more" if len(groups[reason]) > 1 else ""
        lines.append(f"{sizes[reason]:,} in {kinds}: {reason} ({first}{more})")
    return lines


@dataclass(frozen=True, repr=False)
class CompressResult:
    """What `compress` did: one record per layer, with its kernel or the reason it stays dense.

    Attributes
    ----------
    model : nn.Module
        The model that was given, with its kernels.
    layers : tuple of LayerRecord
        One record for each matrix.
    isa : str
        The instruction set of the kernels: `avx512`, `avx2`, `portable`, or `reference` where none
        are compiled.
    threads : int
        How many threads torch has.
    coverage : Coverage
        Of the whole model.
    """

    model: nn.Module
    layers: tuple[LayerRecord, ...]
    isa: str
    threads: int
    coverage: Coverage = field(default_factory=Coverage)

    @property
    def summary(self) -> str:
        """How many layers run sparse, and how many dense for which reason, in one line."""
        sparse = sum(layer.kernel is not None for layer in self.layers)
        reasons = Counter(
            (layer.reason or "").partition(":")[0] for layer in self.layers if layer.kernel is None
        )
        dense = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        left = f", {sum(reasons.values())} dense ({dense})" if reasons else ""
        return f"{sparse} of {len(self.layers)} layers run sparse{left}"

    def __str__(self) -> str:
        """The summary, then a line for each layer: what serves it, or why it stays dense."""
        lines = [f"{len(self.layers)} layers, {self.isa}, {self.threads} threads", self.summary]
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            served = layer.kernel or f"dense: {layer.reason}"
            decided = f" ({layer.decided})" if layer.kernel and layer.decided else ""
            lines.append(f"{layer.name}: {shape}, density {layer.density:.3f}, {served}{decided}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """One line, without the model."""
        return f"CompressResult({type(self.model).__name__}: {self.summary})"

    def _repr_html_(self) -> str:
        """For notebooks: the summary over a table of the layers."""
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in (
                (layer.name, " x ".join(map(str, layer.shape)), f"{layer.density:.3f}",
                 layer.kernel or f"dense: {layer.reason}")
                for layer in self.layers
            )
        )  # fmt: skip
        head = "".join(f"<th>{name}</th>" for name in ("layer", "shape", "density", "served by"))
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>"


def unwrap(model: nn.Module | PruneResult | CompressResult) -> nn.Module:
    """The module itself: inside a result, and inside torch.compile, DataParallel or DDP.

    Names of layers are then the same whether or not the model is wrapped.
    """
    if isinstance(model, (PruneResult, CompressResult)):
        model = model.model
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"expected a torch module or a Gossamer result, not {type(model).__name__}"
        )
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    """What a wrapper of torch holds, None for a module that is none."""
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = model.module if isinstance(model, kinds) else model._modules.get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else None
