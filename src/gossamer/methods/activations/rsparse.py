"""R-Sparse: some inputs exactly, and the rest through a low-rank part of the weight.

A layer's budget is shared between columns that are read for large inputs, and a low-rank part
that serves all other inputs. Where the singular values fall fast, the low-rank part is worth more.

**Paper.** R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference, 2025.
https://arxiv.org/abs/2504.19449

**Claim.** Quality like the dense model's at 50% on Llama-2, Llama-3 and Mistral over ten tasks, and
43% faster end to end with kernels of its own. The claim was not tried here.

**Defaults.** Density 0.5. The share of columns is searched for each layer among 0.02, 0.25, 0.5,
0.75, 0.9 and 1.

**Notes.** The paper searches all shares together by evolution, on the quality of the model. Here
each layer's share is the one with the smallest error of its own output on some calibration inputs,
which takes seconds. With the share 1 inputs are scored by |x| alone and there is no low-rank part,
as published. The rank counts what it reads for any shape of weight; the released budget assumes
square ones. Columns and rank are at least 1. The low-rank part is fed with the inputs that are not
kept, also for single tokens. Its matrices lie beside the weight in memory, and results count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.activations import InputState, InputStats
from gossamer.core.card import Card
from gossamer.core.errors import UsageError
from gossamer.methods.activations.options import check_options

SHARES = (0.02, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class RSparse:
    """Columns for large inputs, a low-rank part for the rest.

    Parameters
    ----------
    density : float
        The fraction of weights that a token reads, low-rank part included.
    share : float, optional
        The share of that for columns, in every layer; None searches one for each.
    per_token : bool
        Keep the same number of inputs for every token, or those above a threshold.

    References
    ----------
    R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference (2025).
    """

    density: float = 0.5
    share: float | None = None
    per_token: bool = False

    card: ClassVar[Card] = Card(
        name="rsparse",
        topic="activations",
        role="input_scorer",
        needs=("inputs",),
        patterns=("unstructured",),
        year=2025,
        link="https://arxiv.org/abs/2504.19449",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_options("RSparse", self.density, "uniform", 0.1)
        share = self.share
        if share is not None and (isinstance(share, bool) or not 0 <= share <= 1):
            raise UsageError(f"RSparse: share is a fraction from 0 to 1, not {share!r}")

    def prepare(self, weight: Tensor, stats: InputStats, density: float) -> InputState:
        """The columns' norms and the low-rank part, for the share that is given or found best."""
        share = self.share if self.share is not None else stats.facts.get("share")
        if density >= 1 or share == 1:
            return InputState(density, facts={"share": 1.0})
        wide = weight.float()
        parts = torch.linalg.svd(wide, full_matrices=False)
        if share is not None:
            return _state(weight, parts, density, share)
        if stats.sample is None or not len(stats.sample):
            raise UsageError(f"{stats.name}: R-Sparse needs calibration inputs, or a share")
        states = [_state(weight, parts, density, each) for each in SHARES]
        errors = [float(_error(wide, stats.sample, state)) for state in states]
        return states[errors.index(min(errors))]

    def score(self, x: Tensor, state: InputState) -> Tensor:
        """|x| times the norm of its column, or |x| where there is no low-rank part; float32."""
        return state.score(x)


def _state(
    weight: Tensor, parts: tuple[Tensor, Tensor, Tensor], density: float, share: float
) -> InputState:
    """The state of a share: columns first, then the rank that the rest of the budget pays."""
    if share >= 1:
        return InputState(density, facts={"share": 1.0})
    out, width = weight.shape
    left, sizes, right = parts
    columns = max(1, int(width * density * share))
    rank = int((out * width * density - columns * out) / (out + width))
    rank = max(1, min(rank, len(sizes)))
    up = (left[:, :rank] * sizes[:rank]).to(weight.dtype).contiguous()
    down = right[:rank].to(weight.dtype).contiguous()
    scale = weight.float().norm(dim=0)
    return InputState(columns / width, scale, (down, up), {"share": float(share)})


def _error(weight: Tensor, x: Tensor, state: InputState) -> Tensor:
    """Of the layer's output over some inputs (count, in), with a threshold over all of them."""
    scores = state.score(x)
    limit = torch.quantile(scores.flatten()[: 1 << 23], 1 - state.density)
    rest = x.masked_fill(scores > limit, 0)
    away = rest @ weight.t()
    if state.bypass is not None:
        down, up = (part.float() for part in state.bypass)
        away = away - rest @ down.t() @ up.t()
    return away.norm()
