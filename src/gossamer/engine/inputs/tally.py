"""What happened in a block of sparse attention: sums while it runs, figures at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.errors import UsageError
from gossamer.engine.inputs.counting import (
    Work,
    executed,
    full_layout,
    pairs,
    possible_pairs,
    worked,
)
from gossamer.engine.inputs.protocols import PairChooser
from gossamer.ops.attention import Layout


@dataclass(frozen=True)
class LayerAttention:
    """The figures of one layer.

    Attributes
    ----------
    name : str
        Of the module, dotted.
    calls, dense_calls : int
        Texts attended sparsely, and calls or texts that ran dense.
    density : float or None
        Computed pairs over those that may be attended; None where no call was sparse.
    recall, error : float or None
        As in `AttentionResult`.
    """

    name: str
    calls: int
    dense_calls: int
    density: float | None
    recall: float | None
    error: float | None


@dataclass(frozen=True, repr=False)
class AttentionResult:
    """What sparse attention did: where it ran, what it computed, and how near it came to dense.

    Operations count two for a multiply-add. Bytes are the keys and values that blocks of queries
    read, and all that the choice reads and writes.

    Attributes
    ----------
    method : str
        With its options.
    layers : tuple of LayerAttention
        Every attention layer of the model.
    calls : int
        Layers' calls that were sparse; a batch with padding makes one for each text.
    decode_calls, short_calls : int
        Those that ran dense: of one query against a cache, and below `dense_below` keys.
    dense_below : int
        Keys below which a prompt runs dense.
    density : float or None
        Measured: computed pairs over those that may be attended, in sparse calls. None without any.
    flops, bytes : int
        Of sparse calls, the choice included.
    choosing_flops, choosing_bytes : int
        Of the choice alone.
    dense_flops, dense_bytes : int
        What dense attention, in blocks of 64, would have taken for the same calls.
    recall : float or None
        The share of dense attention that the computed pairs hold, averaged over queries. None
        unless measured.
    error : float or None
        The norm of the outputs' difference to dense over that of dense. None unless measured.
    """

    method: str
    layers: tuple[LayerAttention, ...]
    calls: int
    decode_calls: int
    short_calls: int
    dense_below: int
    density: float | None
    flops: int
    bytes: int
    choosing_flops: int
    choosing_bytes: int
    dense_flops: int
    dense_bytes: int
    recall: float | None = None
    error: float | None = None

    def check_reached(self) -> None:
        """Raise UsageError where no layer was called at all."""
        if not any(layer.calls + layer.dense_calls for layer in self.layers):
            raise UsageError(
                f"none of {len(self.layers)} attention layers was called in the block of "
                "gs.sparse_attention; run the model inside it"
            )

    def __str__(self) -> str:
        """A few lines for people."""
        reached = sum(layer.calls > 0 for layer in self.layers)
        lines = [
            f"{self.method}: {reached} of {len(self.layers)} layers sparse in {self.calls} calls",
            f"dense: {self.decode_calls} calls of one token, {self.short_calls} below "
            f"{self.dense_below} keys",
        ]
        if self.density is not None:
            lines.append(f"density {self.density:.3f} of the pairs that may be attended")
            lines.append(
                f"operations {self.flops / self.dense_flops:.3f} of dense, the choice "
                f"{self.choosing_flops / self.dense_flops:.3f} of it"
            )
        if self.recall is not None and self.error is not None:
            lines.append(f"recall {self.recall:.4f}, error of outputs {self.error:.4f}")
        return "\n".join(lines)

    __repr__ = __str__


@dataclass
class _Sums:
    """Of one layer, or of all."""

    calls: int = 0
    decode_calls: int = 0
    short_calls: int = 0
    pairs: int = 0
    possible: int = 0
    queries: int = 0
    recall: float = 0.0
    difference: float = 0.0
    norm: float = 0.0
    work: Work = field(default_factory=Work)
    choosing: Work = field(default_factory=Work)
    dense: Work = field(default_factory=Work)

    def add(self, other: _Sums) -> None:
        """Everything summed."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def density(self) -> float | None:
        return self.pairs / self.possible if self.possible else None

    @property
    def mean_recall(self) -> float | None:
        return self.recall / self.queries if self.queries else None

    @property
    def error(self) -> float | None:
        if not self.queries:
            return None
        return (self.difference / self.norm) ** 0.5 if self.norm else 0.0


class Tally:
    """Sums by layer."""

    def __init__(self) -> None:
        self._layers: dict[int, _Sums] = defaultdict(_Sums)
        self._choosing: dict[tuple[object, ...], Work] = {}

    def dense(self, layer: int, queries: int) -> None:
        """A call that ran dense."""
        sums = self._layers[layer]
        sums.decode_calls += queries == 1
        sums.short_calls += queries != 1

    def chosen(self, call: AttentionCall, choose: Callable[[], Layout]) -> tuple[Layout, Work]:
        """The choice, and its work, which is counted in the first call of each shape."""
        key = (*call.query.shape, *call.key.shape, *call.value.shape, call.query.dtype, call.causal)
        if key in self._choosing:
            return choose(), self._choosing[key]
        layout, self._choosing[key] = worked(choose)
        return layout, self._choosing[key]

    def sparse(
        self,
        call: AttentionCall,
        layout: Layout,
        choosing: Work,
        found: tuple[Tensor, Tensor],
        dense: tuple[Tensor, Tensor] | None,
    ) -> None:
        """A call that ran sparse; `dense` is (output, log-sum-exp) over all pairs, if measured."""
        count, possible = pairs(layout, call), possible_pairs(call)
        sums = _Sums(
            calls=1, pairs=count, possible=possible, choosing=choosing,
            work=executed(layout, call, count) + choosing,
            dense=executed(full_layout(call), call, possible),
        )  # fmt: skip
        if dense is not None:
            (output, lse), (whole, whole_lse) = found, dense
            sums.queries = lse.numel()
            sums.recall = float((lse - whole_lse).exp().clamp(max=1).double().sum())
            sums.difference = float((output.float() - whole.float()).double().square().sum())
            sums.norm = float(whole.double().square().sum())
        self._layers[call.layer].add(sums)

    def result(
        self, method: PairChooser, names: Sequence[str], dense_below: int
    ) -> AttentionResult:
        """The figures so far."""
        total, layers = _Sums(), []
        for index, name in enumerate(names):
            sums = self._layers[index]
            total.add(sums)
            dense_calls = sums.decode_calls + sums.short_calls
            layers.append(
                LayerAttention(
                    name, sums.calls, dense_calls, sums.density, sums.mean_recall, sums.error
                )
            )
        return AttentionResult(
            repr(method), tuple(layers), total.calls, total.decode_calls, total.short_calls,
            dense_below, total.density, total.work.flops, total.work.bytes, total.choosing.flops,
            total.choosing.bytes, total.dense.flops, total.dense.bytes, total.mean_recall,
            total.error,
        )  # fmt: skip
