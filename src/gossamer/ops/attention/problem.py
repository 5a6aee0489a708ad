"""What both implementations are given beside queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """A checked layout and the rest, as plain fields: see `Layout` and `attention`.

    Positions are int32 (batch or 1, heads or a divisor, length), given where `causal`; biases are
    of the sums' dtype: block_bias (entries,), key_bias (batch or 1, heads or a divisor, keys).
    """

    offsets: Tensor
    blocks: Tensor
    tiles: Tensor | None
    masks: Tensor | None
    token_offsets: Tensor | None
    tokens: Tensor | None
    block_bias: Tensor | None
    key_bias: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    rows: int
    columns: int
    group: int
    causal: bool
    scale: float
