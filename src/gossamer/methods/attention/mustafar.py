"""Mustafar: the smallest entries of every cached key and value are dropped, and memory falls.

Of each token and head the entries with the smallest magnitudes leave, keys and values apart. What
stays lies in tiles of 64: a bitmap and the kept entries. Attention multiplies the tiles as they are,
and takes one softmax over them and the newest tokens, which stay dense.

**Paper.** Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference, 2025.
https://arxiv.org/abs/2505.22913

**Claim.** 70% of the entries dropped without loss of accuracy, with a cache of 45% of the bytes and
up to 2.23 times the tokens per second. The claim was not tried here: its check waits for a quiet
machine.

**Defaults.** Half of the entries, the last 32 tokens dense, and 256 tokens pruned at once, as in the
paper.

**Notes.** Exactly floor(s d) of d entries leave at sparsity s, ties by index. The released code keeps
all from the floor(s d)-th smallest magnitude on, which is one entry more. The paper's kernel has
float16 and bitmaps with the highest bit first; here entries have the model's dtype and the lowest
bit is first. Keys are pruned after positions are rotated into them, and a prompt after its own dense
attention. Bytes fall less than entries: each 64 places cost 12 bytes beside the kept entries, and
those are padded to a multiple of 8. Each token still reads all that is held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.budget import TopK
from gossamer.core.card import Card
from gossamer.core.density import check_density
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count
from gossamer.ops.kv_tiles import TILE
from gossamer.ops.select import keep


@dataclass(frozen=True)
class Mustafar:
    """The largest entries of each cached key and value, in bitmap tiles.

    Parameters
    ----------
    density : float
        Share of the entries of keys that stay, in (0, 1].
    value_density : float or None
        That of values; None for the same.
    tail : int
        Newest tokens that stay dense.
    every : int
        Tokens that are pruned at once, whenever so many lie before the tail; a multiple of 64.

    References
    ----------
    Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference (2025).
    """

    density: float = 0.5
    value_density: float | None = None
    tail: int = 32
    every: int = 256

    card: ClassVar[Card] = Card(
        name="mustafar",
        topic="attention",
        role="cache",
        needs=(),
        patterns=("unstructured",),
        year=2025,
        link="https://arxiv.org/abs/2505.22913",
        status="experimental",
    )

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.value_density is not None:
            check_density(self.value_density)
        check_count("Mustafar", "tail", self.tail, 0)
        check_count("Mustafar", "every", self.every)
        if self.every % TILE:
            raise UsageError(f"Mustafar's every is a multiple of {TILE}, not {self.every}")

    def kept_entries(self, x: Tensor, keys: bool) -> Tensor:
        """bool, the shape of x (..., width): the largest magnitudes of each token and head."""
        density = self.density if keys or self.value_density is None else self.value_density
        count = math.ceil(density * x.shape[-1] - 1e-9)  # width - floor((1 - density) * width)
        return keep(x.detach().abs(), TopK(count))
