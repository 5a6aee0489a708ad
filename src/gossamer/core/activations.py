"""What methods that choose a layer's inputs are given, and what they give back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputStats:
    """What is known of one layer's inputs.

    sample: float32 (count, in), some inputs as the layer multiplies them; None unless the method
    needs `inputs`. facts: what an earlier calibration of the same layer chose, by name; empty at
    the first one.
    """

    name: str
    sample: Tensor | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class InputState:
    """What one layer needs to choose its inputs, whatever the method.

    An input's score is its magnitude times `scale`. y = W (x kept) + up down (x not kept).

    density: the fraction of inputs kept. scale: (in,), None for ones. bypass: (down, up), of shapes
    (rank, in) and (out, rank): the low-rank part that reads what is not kept; None without. facts:
    what was chosen, as numbers that a file keeps.
    """

    density: float
    scale: Tensor | None = None
    bypass: tuple[Tensor, Tensor] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)

    def score(self, x: Tensor) -> Tensor:
        """Of each input, float32 (..., in), for inputs x (..., in)."""
        size = x.float().abs()
        return size if self.scale is None else size * self.scale
