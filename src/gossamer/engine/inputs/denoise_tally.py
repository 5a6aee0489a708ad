"""What happened in a block of sparse denoising: sums while it runs, figures at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.denoising import Attended
from gossamer.core.errors import UsageError
from gossamer.engine.inputs.counting import Work, possible_pairs


@dataclass(frozen=True, repr=False)
class DenoisingResult:
    """What sparse attention did in a diffusion model: where it ran and what it computed.

    Attributes
    ----------
    method : str
        With its options.
    layers : int
        Attention layers reached.
    runs : int
        Runs begun.
    calls : int
        Layers' calls that the method served: dense_calls + chosen_calls + reused_calls.
    dense_calls, chosen_calls, reused_calls : int
        Calls over all pairs, over pairs chosen in the call, and over those of an earlier step.
    other_calls : int
        Calls that were left as they are, such as cross-attention.
    density : float or None
        Computed pairs over all pairs, in all calls served. None without any.
    sparse_density : float or None
        The same without the dense calls.
    search_density : float or None
        Pairs whose products were computed only in order to choose, over all pairs.
    states, state_bytes : int
        The most states held, one for each layer and branch, and their bytes.
    figures : dict of str to float
        Counts of the method's own.
    flops, dense_flops : int or None
        Of the calls served, searches and choices included, and what dense attention would have
        taken; two for a multiply-add. None unless measured.
    error : float or None
        The norm of the outputs' difference to dense attention on the same inputs, over that of
        dense. None unless measured.
    """

    method: str
    layers: int
    runs: int
    calls: int
    dense_calls: int
    chosen_calls: int
    reused_calls: int
    other_calls: int
    density: float | None
    sparse_density: float | None
    search_density: float | None
    states: int
    state_bytes: int
    figures: Mapping[str, float] = field(default_factory=dict)
    flops: int | None = None
    dense_flops: int | None = None
    error: float | None = None

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.method}: {self.layers} layers, {self.runs} runs, {self.calls} calls",
            f"dense: {self.dense_calls}; pairs chosen: {self.chosen_calls}, reused: "
            f"{self.reused_calls}; left as they are: {self.other_calls}",
            f"states: {self.states}, {self.state_bytes} bytes",
        ]
        if self.density is not None and self.sparse_density is not None:
            lines.append(
                f"density {self.density:.3f}, {self.sparse_density:.3f} where sparse; searched "
                f"{self.search_density:.3f} beside it"
            )
        if self.flops is not None and self.dense_flops:
            lines.append(f"operations {self.flops / self.dense_flops:.3f} of dense")
        if self.error is not None:
            lines.append(f"error of outputs {self.error:.4f}")
        lines += [f"{name}: {value:g}" for name, value in self.figures.items()]
        return "\n".join(lines)

    __repr__ = __str__


class DenoiseTally:
    """Sums over all calls."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.figures: Counter[str] = Counter()
        self.layers: set[int] = set()
        self.passed: Counter[tuple[int, int]] = Counter()
        self.runs = self.states = self.state_bytes = 0
        self._pairs = self._sparse = self._search = self._possible = self._sparse_possible = 0
        self._flops = self._dense_flops = 0
        self._difference = self._norm = 0.0
        self._measured = False

    def served(self, call: AttentionCall, found: Attended) -> None:
        """A call that the method answered."""
        possible = possible_pairs(call)
        self.layers.add(call.layer)
        self.kinds[found.kind] += 1
        self.figures.update(found.figures)
        self._pairs += found.pairs
        self._search += found.search_pairs
        self._possible += possible
        if found.kind != "dense":
            self._sparse += found.pairs
            self._sparse_possible += possible

    def measured(self, call: AttentionCall, found: Attended, chosen: Work, dense: Tensor) -> None:
        """The work of the same call, and dense attention's output."""
        widths = call.query.shape[3] + call.value.shape[3]
        self._measured = True
        # torch's operators in the method are counted; a search that the executor ran is not.
        search = 2 * call.query.shape[3] * found.search_pairs
        self._flops += 2 * widths * found.pairs + max(chosen.flops, search)
        self._dense_flops += 2 * widths * possible_pairs(call)
        self._difference += float((found.output.double() - dense.double()).square().sum())
        self._norm += float(dense.double().square().sum())

    def held(self, states: Mapping[Any, Any]) -> None:
        """Take note of the states that exist now."""
        self.states = max(self.states, len(states))
        self.state_bytes = max(self.state_bytes, sum(map(nbytes, states.values())))

    def result(self, method: str) -> DenoisingResult:
        """The figures so far."""
        kinds = self.kinds
        sparse = self._sparse / self._sparse_possible if self._sparse_possible else None
        possible = self._possible
        error = (self._difference / self._norm) ** 0.5 if self._norm else 0.0
        return DenoisingResult(
            method, len(self.layers), self.runs, kinds.total(), kinds["dense"], kinds["chosen"],
            kinds["reused"], self.passed.total(), self._pairs / possible if possible else None,
            sparse, self._search / possible if possible else None, self.states, self.state_bytes,
            dict(self.figures), self._flops if self._measured else None,
            self._dense_flops if self._measured else None, error if self._measured else None,
        )  # fmt: skip

    def check_reached(self) -> None:
        """Raise UsageError where the method served no call at all."""
        if self.kinds.total():
            return
        seen = ", ".join(f"{q} queries with {k} keys" for q, k in sorted(self.passed))
        raise UsageError(
            "no self-attention was reached in the block of gs.sparse_denoising; "
            + (
                f"calls had {seen}: does the grid fit?"
                if seen
                else "run the model inside it, with attention through torch's "
                "scaled_dot_product_attention or run.attend"
            )
        )

    def check_sparse(self, total: int) -> None:
        """Raise UsageError where a whole run was dense."""
        if self.kinds["dense"] == self.kinds.total():
            raise UsageError(
                f"every call of a run of {total} steps was dense: the method's first dense steps "
                "or layers leave nothing to be sparse; lower them, or take more steps"
            )


def nbytes(state: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(nbytes, state.values()))
    if is_dataclass(state):
        return sum(nbytes(getattr(state, part.name)) for part in fields(state))
    if isinstance(state, Sequence) and not isinstance(state, str):
        return sum(map(nbytes, state))
    return 0
